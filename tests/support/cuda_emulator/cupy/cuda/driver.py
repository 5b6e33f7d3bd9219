"""Only the error."""

from cupy._status import CUDADriverError

__all__ = ["CUDADriverError"]
