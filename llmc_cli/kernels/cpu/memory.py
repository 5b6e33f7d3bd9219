"""Set large arrays to zero, with all threads.

The system provides memory when it is first touched, which takes most of the time.
"""

from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, kernel, ubytes1

PIECE = 1 << 21  # bytes per task: a huge page


@kernel(ubytes1, fastmath=CONTRACT)
def clear(x):
    """x (bytes,) = 0, by all threads: they share the page faults, and on a NUMA machine the memory is distributed."""
    for piece in prange((x.size + PIECE - 1) // PIECE):
        x[piece * PIECE : (piece + 1) * PIECE] = 0
