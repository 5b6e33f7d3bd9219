"""Launches of embedding.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import row_threads, width
from llmc_cli.kernels.spec import Array

SEARCHERS = 256
"""Threads that compare keys, 1,024 between two barriers, and then add up 2,048 columns of bf16 or 1,024 of float at a
time. A constant of embedding.cu, too."""


def embedding_forward(device: Device, x: Array, wte: Array, wpe: Array, ids: Array, positions: Array) -> None:
    """x (N,C) = wte (Vp,C)[ids (N,)] + wpe (T,C)[positions (N,)], overwritten. A block for each row, for single tokens'
    sake, whose threads take 16 bytes each."""
    N, C = x.shape
    args = (x, wte, wpe, ids, positions, np.int32(N), np.int32(C))
    device.launch("embedding", "embedding_forward", (N,), (row_threads(C, width(device.real)),), args)


def embedding_backward(device: Device, dwte: Array, dx: Array, ids: Array) -> None:
    """dwte (Vp,C)[ids (N,)] += dx (N,C). A block for each row, of which those of an id's first row do the work."""
    N, C = dx.shape
    device.launch("embedding", "embedding_backward", (N,), (SEARCHERS,), (dwte, dx, ids, np.int32(N), np.int32(C)))


def position_backward(device: Device, dwpe: Array, dx: Array, positions: Array, acc: bool) -> None:
    """dwpe (T,C)[positions (N,)] = dx (N,C), 0 where no row is; with ``acc`` added to. A block for each row of dwpe."""
    N, C = dx.shape
    args = (dwpe, dx, positions, np.int32(N), np.int32(C), np.int32(acc))
    device.launch("embedding", "position_backward", (dwpe.shape[0],), (SEARCHERS,), args)
