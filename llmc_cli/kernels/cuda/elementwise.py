"""Launches of elementwise.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import row_threads, width
from llmc_cli.kernels.spec import Array

BIAS_ROWS = 4  # rows per block, which reads the bias once for all of them; also a constant of elementwise.cu
THREADS = 256  # threads per block of the kernels over flat arrays
ROUND_BLOCKS = 256
"""Blocks per matrix of ``round_weights``: enough to saturate memory with a large matrix, few for a small one."""


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
    """Round K float32 arrays to bf16. Each row of table (K,3), int64 on the device, holds a source address, a
    destination address and a number of elements."""
    K = table.shape[0]
    device.launch("elementwise", "round_weights", (ROUND_BLOCKS, K), (THREADS,), (table, np.int32(K)))


def _grid(device: Device, array: Array) -> tuple[int]:
    """Return the grid for a flat array of which each thread handles 16 bytes."""
    return (-(-array.size // (THREADS * width(device.real))),)
