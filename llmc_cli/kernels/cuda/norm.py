"""Launches of norm.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import WARP, row_threads, width
from llmc_cli.kernels.spec import Array

STRIPES = 8  # warps per block of the kernels that sum over rows; also a constant of norm.cu
MIN_COLUMN_ROWS = 32  # minimum rows per piece of ``column_partials``: 4 per warp
MAX_COLUMN_PARTS = 256  # with the blocks over columns enough for a large GPU, and few partial sums
NORM_COLUMNS = 4  # columns that a thread of ``norm_backward`` handles at a time; THREAD_COLUMNS in norm.cu
MIN_NORM_ROWS = 16  # minimum rows per piece of ``norm_backward``: two or three iterations of a block
MAX_NORM_PARTS = 512  # four blocks per multiprocessor of a large GPU


def residual_norm_forward(
    device: Device, res: Array, y: Array, mean: Array, rstd: Array,
    x: Array, delta: Array | None, bias: Array | None, w: Array, b: Array, eps: float,
) -> None:  # fmt: skip
    """res (N,C) = x (N,C) + delta (N,C) + bias (C,), y (N,C) = the normalized res, with mean and rstd (N,). All
    overwritten; bias may be None. If delta is None, x is normalized and res is not written. res may be x. One block per
    row, which it holds in shared memory."""
    N, C = x.shape
    args = (res, y, mean, rstd, x, delta, bias, w, b, np.int32(N), np.int32(C), np.float32(eps))
    block = (row_threads(C, width(device.real)),)
    device.launch("norm", "residual_norm_forward", (N,), block, args, shared=C * device.real().itemsize)


def norm_parts(N: int) -> int:
    """Return P, the number of pieces into which ``norm_backward`` divides N rows, one block for each."""
    return _part_count(N, MIN_NORM_ROWS, MAX_NORM_PARTS)


def norm_backward(
    device: Device, dx: Array, parts: Array,
    dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None,
) -> None:  # fmt: skip
    """dx (N,C) = dres (N,C) + gradient of dy (N,C) through the norm of res; dres may be None, and dx may be dres or dy.
    parts (2,P,C) = partial sums of dw, then of db, over each of P = norm_parts(N) pieces of the rows. Both
    overwritten."""
    N, C = dx.shape
    args = (dx, parts, dy, res, mean, rstd, w, dres, np.int32(N), np.int32(C))
    block = (row_threads(C, NORM_COLUMNS),)
    device.launch("norm", "norm_backward", (parts.shape[1],), block, args, shared=2 * C * 4)


def column_parts(N: int) -> int:
    """Return P, the number of pieces into which ``column_partials`` divides N rows."""
    return _part_count(N, MIN_COLUMN_ROWS, MAX_COLUMN_PARTS)


def _part_count(N: int, min_rows: int, max_parts: int) -> int:
    """Return how many pieces N rows are divided into. None is empty, and all but the last have ``min_rows`` or more.

    The count depends on nothing else, which keeps the sums reproducible.
    """
    return -(-N // max(min_rows, -(-N // max_parts)))


def column_partials(device: Device, parts: Array, dy: Array) -> None:
    """parts (1,P,O) = sums of dy (N,O) over each of P = column_parts(N) pieces of its rows, overwritten."""
    N, columns = dy.shape
    args = (parts, dy, np.int32(N), np.int32(columns))
    grid = (-(-columns // (WARP * width(device.real))), parts.shape[1])  # 16 bytes per lane of a warp
    device.launch("norm", "column_partials", grid, (STRIPES * WARP,), args)


def sum_partials(device: Device, outs: tuple[Array, ...], parts: Array, acc: bool) -> None:
    """outs[i] (O,) = sum of parts[i] over P, for one or two outputs; parts (len(outs),P,O). Overwritten, or added to
    with ``acc``. One block per 32 columns of each output."""
    count, P, columns = parts.shape
    args = (outs[0], outs[-1], parts, np.int32(P), np.int32(columns), np.int32(acc))
    device.launch("norm", "sum_partials", (-(-columns // WARP), count), (STRIPES * WARP,), args)
