"""Launches of norm.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import WARP, row_threads, width
from llmc_cli.kernels.spec import Array

PIECE_ROWS = 32  # at least, of which each of a block's 8 warps adds up 4
MOST_PIECES = 256  # with the columns enough blocks for a large device, and little to add up behind them
STRIPES = 8  # warps of a block that adds up rows; a constant of norm.cu, too
NORM_COLUMNS = 4  # of a row that a thread of ``norm_backward`` takes at a time; NARROW of norm.cu
NORM_ROWS = 16  # of a piece of ``norm_backward``, at least: two or three turns of a block
MOST_NORM_PIECES = 512  # four blocks for each multiprocessor of a large device


def residual_norm_forward(
    device: Device, res: Array, y: Array, mean: Array, rstd: Array,
    x: Array, delta: Array | None, bias: Array | None, w: Array, b: Array, eps: float,
) -> None:  # fmt: skip
    """res (N,C) = x (N,C) + delta (N,C) + bias (C,; absent: 0), y (N,C) = the normalized res, mean and rstd (N,), all
    overwritten; without delta x is normalized, and res not written. res may be x. A block for each row, with the row in
    shared memory."""
    N, C = x.shape
    args = (res, y, mean, rstd, x, delta, bias, w, b, np.int32(N), np.int32(C), np.float32(eps))
    block = (row_threads(C, width(device.real)),)
    device.launch("norm", "residual_norm_forward", (N,), block, args, shared=C * device.real().itemsize)


def norm_parts(N: int) -> int:
    """P: into how many pieces ``norm_backward`` divides N rows, a block for each."""
    return _pieces(N, NORM_ROWS, MOST_NORM_PIECES)


def norm_backward(
    device: Device, dx: Array, parts: Array,
    dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None,
) -> None:  # fmt: skip
    """dx (N,C) = dres (N,C; absent: 0) + the gradient of dy (N,C) through the norm of res; it may be dres or dy. parts
    (2,P,C) = for each of P = norm_parts(N) pieces of the rows the sums that give dw, then db. Both overwritten."""
    N, C = dx.shape
    args = (dx, parts, dy, res, mean, rstd, w, dres, np.int32(N), np.int32(C))
    block = (row_threads(C, NORM_COLUMNS),)
    device.launch("norm", "norm_backward", (parts.shape[1],), block, args, shared=2 * C * 4)


def column_parts(N: int) -> int:
    """P: into how many pieces ``column_partials`` divides N rows."""
    return _pieces(N, PIECE_ROWS, MOST_PIECES)


def _pieces(N: int, rows: int, most: int) -> int:
    """Pieces of at least so many rows, at most so many, and none without one. They depend on nothing else, and so do
    sums."""
    return -(-N // max(rows, -(-N // most)))


def column_partials(device: Device, parts: Array, dy: Array) -> None:
    """parts (1,P,O) = the sums of dy (N,O) over each of P = column_parts(N) pieces of its rows, overwritten."""
    N, columns = dy.shape
    args = (parts, dy, np.int32(N), np.int32(columns))
    grid = (-(-columns // (WARP * width(device.real))), parts.shape[1])  # 16 bytes for each lane of a warp
    device.launch("norm", "column_partials", grid, (STRIPES * WARP,), args)


def sum_partials(device: Device, outs: tuple[Array, ...], parts: Array, acc: bool) -> None:
    """Each of ``outs``, one array (O,) or two = the sum over P of its share of parts (1 or 2,P,O), overwritten, or
    added to with ``acc``. A block for 32 columns of each."""
    count, P, columns = parts.shape
    args = (outs[0], outs[-1], parts, np.int32(P), np.int32(columns), np.int32(acc))
    device.launch("norm", "sum_partials", (-(-columns // WARP), count), (STRIPES * WARP,), args)
