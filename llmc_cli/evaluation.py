"""The validation loss."""

import numpy as np

from llmc_cli.batches import Batches
from llmc_cli.models.gpt2 import GPT2


def mean_loss(model: GPT2, batches: Batches, count: int) -> float:
    """The mean token loss (nats) over the first ``count`` batches (-1, or more than there are: all of them), whose
    shape the model is prepared for."""
    count = min(count, batches.num_samples) if count >= 0 else batches.num_samples
    batches.rewind()
    total = 0.0
    for _ in range(count):
        batches.next()
        model.forward(batches.inputs)
        total += float(np.mean(model.loss(batches.targets), dtype=np.float64))
    return total / count
