"""Launches of optimizer.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.spec import Array

MAX_SQUARE_PARTS = 4096
"""Maximum number of partial sums of squares, one per block: more blocks than any GPU runs at once, so that no
multiprocessor is idle for long while the last blocks finish."""

BLOCK_ELEMENTS = 4096  # elements per block, 16 per thread; also a constant of optimizer.cu
THREADS = 256


def square_partials(device: Device, parts: Array, g: Array) -> int:
    """Write n partial sums of the squares of g (P,) to the front of parts (MAX_SQUARE_PARTS,) float64. Return n, which
    depends only on P."""
    n: int = min(MAX_SQUARE_PARTS, -(-g.size // BLOCK_ELEMENTS))
    device.launch("optimizer", "square_partials", (n,), (THREADS,), (parts, g, np.int64(g.size)))
    return n


def sum_doubles(device: Device, out: Array, parts: Array, n: int) -> None:
    """out (1,) float64 = sum of the first n of parts, overwritten. One block."""
    device.launch("optimizer", "sum_doubles", (1,), (THREADS,), (out, parts, np.int32(n)))


def sum_squares(device: Device, out: Array, parts: Array, g: Array) -> None:
    """out (1,) float64 = sum of the squares of g (P,), overwritten. parts (MAX_SQUARE_PARTS,) float64 is scratch
    memory."""
    sum_doubles(device, out, parts, square_partials(device, parts, g))


def adamw(
    device: Device, master: Array, m: Array, v: Array, g: Array, segments: Array, hyper: Array, sumsq: Array
) -> None:
    """Update master, m, v (P,) in place by g (P,), as specified in spec.py; segments (K,3) must be in ascending order.

    One block per 4,096 elements. It looks up its segments and reads hyper once.
    """
    grid = (-(-master.size // BLOCK_ELEMENTS),)
    args = (master, m, v, g, segments, np.int32(segments.shape[0]), hyper, sumsq, np.int64(master.size))
    device.launch("optimizer", "adamw", grid, (THREADS,), args)
