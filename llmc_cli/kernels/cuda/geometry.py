"""Launch geometry shared by the kernels."""

from typing import Any

import numpy as np

WARP = 32
ROW_THREADS = 256
"""Maximum number of threads per row. More threads make barriers slower; longer rows take several iterations."""


def width(real: Any) -> int:
    """Return the number of elements per 16-byte access; WIDTH in common.cuh."""
    return 16 // int(np.dtype(real).itemsize)


def row_threads(columns: int, per_thread: int, limit: int = ROW_THREADS) -> int:
    """Return the block size, in whole warps, for a row of which each thread handles ``per_thread`` columns at a time.

    The number of iterations is as small as ``limit`` allows, and less than a warp per iteration is idle.
    """
    chunks = -(-columns // per_thread)
    iterations = -(-chunks // limit)
    return -(-chunks // (iterations * WARP)) * WARP
