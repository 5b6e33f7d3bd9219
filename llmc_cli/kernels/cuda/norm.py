"""Launches of norm.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import WARP, row_threads, width
from llmc_cli.kernels.spec import Array

PIECE_ROWS = 32  # at least, of which each of a block's 8 warps adds up 4
MOST_PIECES = 256  # with the columns enough blocks for a large device, and little to add up behind them
STRIPES = 8  # warps of a block that adds up rows; a constant of norm.cu, too


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


def norm_backward(
    device: Device, dx: Array, dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None
) -> None:
    """dx (N,C) = dres (N,C; absent: 0) + the gradient of dy (N,C) through the norm of res, overwritten; it may be dres
    or dy. A block for each row, with the rows of dy and res in shared memory."""
    N, C = dx.shape
    args = (dx, dy, res, mean, rstd, w, dres, np.int32(N), np.int32(C))
    block = (row_threads(C, width(device.real)),)
    device.launch("norm", "norm_backward", (N,), block, args, shared=2 * C * device.real().itemsize)


def column_parts(N: int) -> int:
    """P: into how many pieces ``column_partials`` divides N rows. It depends on nothing else, and so does the sum."""
    rows = max(PIECE_ROWS, -(-N // MOST_PIECES))
    return -(-N // rows)


def norm_parts(N: int) -> int:
    """P of ``norm_weight_partials``."""
    return column_parts(N)


def norm_weight_partials(device: Device, parts: Array, dy: Array, res: Array, mean: Array, rstd: Array) -> None:
    """parts (2,P,C) = for each of P = norm_parts(N) pieces of the rows the sums that give dw, then db; overwritten."""
    N, C = dy.shape
    args = (parts, dy, res, mean, rstd, np.int32(N), np.int32(C))
    device.launch("norm", "norm_weight_partials", _grid(device, C, parts.shape[1]), (STRIPES * WARP,), args)


def column_partials(device: Device, parts: Array, dy: Array) -> None:
    """parts (1,P,O) = the sums of dy (N,O) over each of P = column_parts(N) pieces of its rows, overwritten."""
    N, columns = dy.shape
    args = (parts, dy, np.int32(N), np.int32(columns))
    device.launch("norm", "column_partials", _grid(device, columns, parts.shape[1]), (STRIPES * WARP,), args)


def sum_partials(device: Device, outs: tuple[Array, ...], parts: Array, acc: bool) -> None:
    """Each of ``outs``, one array (O,) or two = the sum over P of its share of parts (1 or 2,P,O), overwritten, or
    added to with ``acc``. A block for 32 columns of each."""
    count, P, columns = parts.shape
    args = (outs[0], outs[-1], parts, np.int32(P), np.int32(columns), np.int32(acc))
    device.launch("norm", "sum_partials", (-(-columns // WARP), count), (STRIPES * WARP,), args)


def _grid(device: Device, columns: int, pieces: int) -> tuple[int, int]:
    """A block for each piece of the rows and as many columns as the lanes of a warp take 16 bytes of."""
    return -(-columns // (WARP * width(device.real))), pieces
