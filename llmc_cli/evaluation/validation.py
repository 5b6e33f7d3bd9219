"""The validation loss."""

import numpy as np

from llmc_cli.data.batches import Batches
from llmc_cli.models.gpt2 import GPT2


def mean_loss(model: GPT2, batches: Batches, count: int) -> float:
    """The mean token loss (nats) over the first ``count`` batches, whose shape the model is prepared for.

    -1: as many as the tokens fill. Where there are fewer it begins anew, as the C trainer does.
    """
    if count == -1:
        count = batches.num_tokens // (batches.B * batches.T)
    batches.rewind()
    total = 0.0
    for _ in range(count):
        batches.next()
        model.forward(batches.inputs)
        total += float(np.mean(model.compute_losses(batches.targets), dtype=np.float64))
    return total / count
