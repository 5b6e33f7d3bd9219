"""The public names of ``cupy.cuda`` that llmc uses."""

from cupy.cuda import cublas, driver, memory, runtime, stream
from cupy.cuda.device import Device
from cupy.cuda.memory import MemoryPool, alloc_pinned_memory
from cupy.cuda.stream import Event, Graph, Stream, get_elapsed_time

__all__ = [
    "Device",
    "Event",
    "Graph",
    "MemoryPool",
    "Stream",
    "alloc_pinned_memory",
    "cublas",
    "driver",
    "get_elapsed_time",
    "memory",
    "runtime",
    "stream",
]
