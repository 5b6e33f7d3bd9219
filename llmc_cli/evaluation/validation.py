"""The validation loss."""

import numpy as np

from llmc_cli.data.batches import Batches
from llmc_cli.models.gpt2 import GPT2


def mean_loss(model: GPT2, batches: Batches, count: int) -> float:
    """Return the mean loss per token (nats) over the first ``count`` batches, for whose shape the model is prepared.

    With ``count`` -1, that is tokens // (B·T) batches. After the last batch it starts over, as in llm.c.
    """
    if count == -1:
        count = batches.num_tokens // (batches.B * batches.T)
    batches.rewind()
    total = 0.0
    for _ in range(count):
        batches.next_batch()
        model.forward(batches.inputs)
        total += float(np.mean(model.compute_losses(batches.targets), dtype=np.float64))
    return total / count
