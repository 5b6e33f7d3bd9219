"""Launches of embedding.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import row_threads, width
from llmc_cli.kernels.spec import Array

THREADS = 256
"""Threads per block of the backward kernels: they compare 1,024 keys between two barriers, then sum 2,048 columns in
bf16 or 1,024 in float32 at a time. Also a constant of embedding.cu."""


def embedding_forward(device: Device, x: Array, wte: Array, wpe: Array, ids: Array, positions: Array) -> None:
    """x (N,C) = wte (Vp,C)[ids (N,)] + wpe (T,C)[positions (N,)], overwritten. One block per row, 16 bytes per thread,
    which parallelizes even a single token."""
    N, C = x.shape
    args = (x, wte, wpe, ids, positions, np.int32(N), np.int32(C))
    device.launch("embedding", "embedding_forward", (N,), (row_threads(C, width(device.real)),), args)


def embedding_backward(device: Device, dwte: Array, dx: Array, ids: Array) -> None:
    """dwte (Vp,C)[ids (N,)] += dx (N,C). One block per row; the block of the first row with an id sums all its rows."""
    N, C = dx.shape
    device.launch("embedding", "embedding_backward", (N,), (THREADS,), (dwte, dx, ids, np.int32(N), np.int32(C)))


def position_backward(device: Device, dwpe: Array, dx: Array, positions: Array, acc: bool) -> None:
    """dwpe (T,C)[positions (N,)] = dx (N,C), 0 for unused positions; added to with ``acc``. One block per row of
    dwpe."""
    N, C = dx.shape
    args = (dwpe, dx, positions, np.int32(N), np.int32(C), np.int32(acc))
    device.launch("embedding", "position_backward", (dwpe.shape[0],), (THREADS,), args)
