"""Memory from the system, which finds it when it is first touched."""

from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, kernel, ubytes1

PIECE = 1 << 21  # bytes a task: a huge page


@kernel(ubytes1, fastmath=CONTRACT)
def clear(x):
    """x = 0. All threads share the wait for the system, and on a machine of several nodes each has a part near it."""
    for piece in prange((x.size + PIECE - 1) // PIECE):
        x[piece * PIECE : (piece + 1) * PIECE] = 0
