"""The driver's error."""

from cupy._status import CUDADriverError

__all__ = ["CUDADriverError"]
