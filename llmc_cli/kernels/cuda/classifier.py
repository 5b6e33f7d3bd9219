"""Launches of classifier.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import row_threads
from llmc_cli.kernels.spec import Array

THREADS = 1024
"""At most, for one row: few blocks at once on a processor, so that their rows, of 200 KB each, stay in the cache until
they are read a second time."""


def softmax_loss(
    device: Device, dlogits: Array, losses: Array, logits: Array, targets: Array, V: int, dloss: float, gradient: bool
) -> None:
    """losses (N,) = the cross-entropy of logits (N,Vp) over their first V columns, 0 where targets (N,) is -1; with
    ``gradient`` dlogits (N,Vp) = dloss · the gradient of their sum, in the padding 0. All overwritten; dlogits may be
    logits where activations are float, and is not touched without ``gradient``. A block for each row."""
    N, Vp = logits.shape
    args = (dlogits, losses, logits, targets, np.int32(V), np.int32(Vp), np.float32(dloss), np.int32(gradient))
    device.launch("classifier", "softmax_loss", (N,), (row_threads(Vp, 4, THREADS),), args)
