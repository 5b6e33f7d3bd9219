"""Launches of elementwise.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import row_threads, width
from llmc_cli.kernels.spec import Array

BIAS_ROWS = 4  # rows of a block, which reads the bias once for them; a constant of elementwise.cu, too
THREADS = 256  # of what knows no rows
SHARES = 256
"""Blocks for each matrix that is rounded: alone they keep the memory busy with the largest, and are few for a small."""


def add_bias(device: Device, y: Array, b: Array) -> None:
    """y (N,O) += b (O,)."""
    N, columns = y.shape
    grid, block = (-(-N // BIAS_ROWS),), (row_threads(columns, width(device.real)),)
    device.launch("elementwise", "add_bias", grid, block, (y, b, np.int32(N), np.int32(columns)))


def bias_gelu_forward(device: Device, act: Array, pre: Array, b: Array) -> None:
    """pre (N,F) += b (F,); act (N,F) = gelu(pre), overwritten."""
    N, F = pre.shape
    grid, block = (-(-N // BIAS_ROWS),), (row_threads(F, width(device.real)),)
    device.launch("elementwise", "bias_gelu_forward", grid, block, (act, pre, b, np.int32(N), np.int32(F)))


def gelu_forward(device: Device, act: Array, pre: Array) -> None:
    """act = gelu(pre), overwritten."""
    device.launch("elementwise", "gelu_forward", _grid(device, pre), (THREADS,), (act, pre, np.int64(pre.size)))


def gelu_backward(device: Device, dpre: Array, pre: Array) -> None:
    """dpre *= gelu'(pre)."""
    device.launch("elementwise", "gelu_backward", _grid(device, pre), (THREADS,), (dpre, pre, np.int64(pre.size)))


def round_weights(device: Device, table: Array) -> None:
    """Round float arrays to bf16 ones: table (K,3) int64 on the device, rows of source address, destination address and
    number of elements."""
    K = table.shape[0]
    device.launch("elementwise", "round_weights", (SHARES, K), (THREADS,), (table, np.int32(K)))


def _grid(device: Device, array: Array) -> tuple[int]:
    """Blocks whose threads take 16 bytes each."""
    return (-(-array.size // (THREADS * width(device.real))),)
