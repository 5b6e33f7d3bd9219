"""A fake of the part of CuPy that llmc uses: kernels on the emulator, cuBLAS on NumPy, memory of the host.

It is stricter than CuPy. It has nothing that the backend does not use; it refuses what CuPy would quietly do wrong, as
passing a Python int to a kernel; its memory is poisoned, its streams are as late as they may be (cuda/stream.py), and
every address must lie in memory that is alive. _status.py lists the environment variables that choose what machine
it plays.
"""

from cupy import cuda
from cupy._array import empty, ndarray, zeros
from cupy._raw import RawModule

__version__ = "14.2.0"


def get_default_memory_pool():
    return cuda.MemoryPool()


__all__ = ["RawModule", "__version__", "cuda", "empty", "get_default_memory_pool", "ndarray", "zeros"]
