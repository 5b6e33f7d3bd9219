"""A fake device that records launches and copies without executing them, for running the backend at any size."""

from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import MagicMock

import numpy as np

from llmc_cli.kernels.cuda.blas import INTERFACE
from llmc_cli.kernels.cuda.device import TENSOR_CORES


class Launch(NamedTuple):
    """One kernel launch: threads per block, bytes of dynamic shared memory."""

    program: str
    kernel: str
    threads: int
    shared: int


class AddressedArray(np.ndarray):
    """An array with ``data.ptr`` as on a device. All elements share one address, so it takes no memory."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class RecordingDevice:
    """A replacement for ``Device`` that records launches, products and copies."""

    def __init__(self, bf16, capability):
        self.name, self.bf16, self.capability = "recording", bf16, capability
        self.real = np.uint16 if bf16 else np.float32
        self.tensor_cores = capability >= TENSOR_CORES
        self.stream = MagicMock()
        self.cublas = MagicMock()
        self.cublas_library = MagicMock()
        for name in INTERFACE:
            getattr(self.cublas_library(), name).return_value = 0  # success
        self.launches = 0
        self.launched = []  # a Launch each
        self.copies = []  # of "upload", "download", "copy" each

    @property
    def products(self):
        """The number of cuBLAS products."""
        return self.cublas_library().cublasGemmEx.call_count

    def record_launch(self, *arguments):
        pass

    def alloc(self, shape, dtype):
        return np.broadcast_to(np.zeros(1, dtype), shape).view(AddressedArray)

    def upload(self, array, values):
        self.copies.append("upload")

    def upload_async(self, array, values):
        self.copies += ["upload", "copy"]  # to the device, and there into place

    def download(self, array):
        self.copies.append("download")
        return array

    def copy(self, target, source):
        self.copies.append("copy")

    def synchronize(self):
        pass

    def launch(self, file, kernel, grid, block, args, shared=0):
        self.launched.append(Launch(file, kernel, int(np.prod(block)), shared))
