"""What launches have in common: how many threads, and how much each of them does."""

from typing import Any

import numpy as np

WARP = 32
ROW_THREADS = 256
"""At most, for one row: more make barriers dearer; a longer row goes through them in several turns."""


def width(real: Any) -> int:
    """Elements that one access of 16 bytes moves; WIDTH of common.cuh."""
    return 16 // int(np.dtype(real).itemsize)


def row_threads(columns: int, per_thread: int, most: int = ROW_THREADS) -> int:
    """Whole warps for a row of which each thread takes ``per_thread`` columns at a time, in turns that are all full but
    for less than a warp."""
    pieces = -(-columns // per_thread)
    turns = -(-pieces // most)
    return -(-pieces // (turns * WARP)) * WARP
