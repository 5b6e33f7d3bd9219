"""Launches of classifier.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import row_threads
from llmc_cli.kernels.spec import Array

THREADS = 1024
"""Maximum number of threads per row. Large blocks mean few rows at once on a multiprocessor, so that the rows, 200 KB
each, are still in the cache when they are read a second time."""


def softmax_loss(
    device: Device, dlogits: Array, losses: Array, logits: Array, targets: Array, V: int, dloss: float, gradient: bool
) -> None:
    """losses (N,) = cross-entropy of logits (N,Vp) over their first V columns, 0 where targets (N,) is -1. With
    ``gradient``, dlogits (N,Vp) = dloss · the gradient of the sum of losses, 0 in the padding; without it dlogits is
    not written. All overwritten; dlogits may be logits if activations are float32. One block per row."""
    N, Vp = logits.shape
    args = (dlogits, losses, logits, targets, np.int32(V), np.int32(Vp), np.float32(dloss), np.int32(gradient))
    device.launch("classifier", "softmax_loss", (N,), (row_threads(Vp, 4, THREADS),), args)
