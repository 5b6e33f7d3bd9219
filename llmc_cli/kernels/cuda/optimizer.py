"""Launches of optimizer.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.spec import Array

SQUARE_PARTS = 4096
"""Partial sums of squares, at most: as many blocks as no device runs at once, so that none of it waits for the last."""

TAKEN = 4096  # elements of a block, 16 to a thread; a constant of optimizer.cu, too
THREADS = 256


def square_partials(device: Device, parts: Array, g: Array) -> int:
    """parts (SQUARE_PARTS,) float64: the first n = the sums of the squares of g (P,) that n blocks come to. Returns n,
    which depends on P only."""
    n: int = min(SQUARE_PARTS, -(-g.size // TAKEN))
    device.launch("optimizer", "square_partials", (n,), (THREADS,), (parts, g, np.int64(g.size)))
    return n


def sum_doubles(device: Device, out: Array, parts: Array, n: int) -> None:
    """out (1,) float64 = the sum of the first n of parts, overwritten; by one block."""
    device.launch("optimizer", "sum_doubles", (1,), (THREADS,), (out, parts, np.int32(n)))


def sum_squares(device: Device, out: Array, parts: Array, g: Array) -> None:
    """out (1,) float64 = the sum of the squares of g (P,), overwritten, by way of parts (SQUARE_PARTS,) float64."""
    sum_doubles(device, out, parts, square_partials(device, parts, g))


def adamw(
    device: Device, master: Array, m: Array, v: Array, g: Array, segments: Array, hyper: Array, sumsq: Array
) -> None:
    """One update in place of master, m, v (P,) by g (P,), as in spec.py, but segments (K,3) must ascend. A block for
    4,096 elements, which looks up its place in segments and reads hyper once for them."""
    grid = (-(-master.size // TAKEN),)
    args = (master, m, v, g, segments, np.int32(segments.shape[0]), hyper, sumsq, np.int64(master.size))
    device.launch("optimizer", "adamw", grid, (THREADS,), args)
