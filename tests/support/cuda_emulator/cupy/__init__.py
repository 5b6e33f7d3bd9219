"""A fake of the part of CuPy that llmc uses: kernels run on the emulator, cuBLAS uses NumPy, and device
memory is host memory.

It is stricter than CuPy. It provides only what the backend uses and rejects what CuPy silently does wrong, such as
passing a Python int to a kernel. New memory is poisoned, streams defer their work as long as CUDA permits
(cuda/stream.py), and every address must lie in allocated memory. _status.py lists the environment variables that select
the simulated machine.
"""

from cupy import cuda
from cupy._array import empty, ndarray, zeros
from cupy._raw import RawModule

__version__ = "14.2.0"


def get_default_memory_pool():
    return cuda.MemoryPool()


__all__ = ["RawModule", "__version__", "cuda", "empty", "get_default_memory_pool", "ndarray", "zeros"]
