"""Products of row-major matrices by cuBLAS, which thinks in columns.

CuPy makes the handle. The products are asked of cuBLAS itself, by its C interface: cuBLAS may be captured where it has
its workspace from its caller, but CuPy refuses to ask it meanwhile, and takes the workspace away at each of its calls.
"""

import ctypes
from typing import Any

import numpy as np

from llmc_cli.kernels.cuda.device import CublasError, Device
from llmc_cli.kernels.spec import Array

COMPUTE = {"fp32": "CUBLAS_COMPUTE_32F_PEDANTIC", "tf32": "CUBLAS_COMPUTE_32F_FAST_TF32", "bf16": "CUBLAS_COMPUTE_32F"}
"""By precision, all with sums in float32; PEDANTIC lets nothing be rounded before it is multiplied."""

WHOLE_SUMS = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: of a product divided along K, the parts are float32, too."""

TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 14}
"""cudaDataType: CUDA_R_32F; and CUDA_R_16BF, whose bits NumPy can only keep as uint16."""

SCALARS = np.array([0.0, 1.0], np.float32)  # beta and alpha, read by address when a product is asked for

POINTER, INT = ctypes.c_void_p, ctypes.c_int
INTERFACE = {
    "cublasSetStream_v2": (POINTER, POINTER),  # handle, stream
    "cublasSetMathMode": (POINTER, INT),  # handle, mode
    "cublasSetWorkspace_v2": (POINTER, POINTER, ctypes.c_size_t),  # handle, memory, bytes
    "cublasGemmEx": (
        *(POINTER, INT, INT, INT, INT, INT),  # handle, transa, transb, m, n, k
        *(POINTER, POINTER, INT, INT, POINTER, INT, INT),  # alpha, A, its type and distance of columns, the same of B
        *(POINTER, POINTER, INT, INT, INT, INT),  # beta, C, its type and distance, computeType, algorithm
    ),
}
"""What is called of cuBLAS, all with a status as result; the same since CUDA 11."""

WORKSPACE = 4 << 20  # bytes, as NVIDIA recommends
LARGE_WORKSPACE, LARGE_FROM = 32 << 20, 90  # from Hopper on


class Blas:
    """``precision``: fp32, tf32 or bf16, in which operands are multiplied. The first product allocates
    ``workspace_bytes``."""

    def __init__(self, device: Device, precision: str) -> None:
        self._device = device
        self._cublas: Any = device.cublas()
        self._library: Any = device.cublas_library()
        for name, types in INTERFACE.items():
            getattr(self._library, name).argtypes = types
        self._compute: int = getattr(self._cublas, COMPUTE[precision])
        self._handle: int = self._cublas.create()
        self.workspace_bytes = LARGE_WORKSPACE if device.capability >= LARGE_FROM else WORKSPACE
        self._workspace: Array | None = None

    def _begin(self) -> None:
        self._workspace = self._device.alloc((self.workspace_bytes,), np.uint8)
        self._call("cublasSetMathMode", WHOLE_SUMS)
        self._call("cublasSetStream_v2", self._device.stream.ptr)  # before the workspace, which it takes away
        self._call("cublasSetWorkspace_v2", self._workspace.data.ptr, self.workspace_bytes)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(self._handle, *arguments)
        if status:
            raise CublasError(f"{name}: cuBLAS answers with status {status}")

    def __call__(self, out: Array, a: Array, b: Array, turn_a: bool, turn_b: bool, acc: bool = False) -> None:
        """out (M,N) = a (M,K) · b (K,N), added to with ``acc``; ``turn_a``: a is given as (K,M), ``turn_b``: b as
        (N,K). a and b are of one dtype, out may be float32 where they are bfloat16.

        A row-major matrix is, in columns, its transpose. So this asks for outᵀ = bᵀ · aᵀ.
        """
        if self._workspace is None:
            self._begin()
        cublas = self._cublas
        M, N = out.shape
        K = a.shape[0] if turn_a else a.shape[1]
        kind, out_kind = TYPES[np.dtype(a.dtype)], TYPES[np.dtype(out.dtype)]
        operation = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}
        beta, alpha = SCALARS.ctypes.data + SCALARS.itemsize * acc, SCALARS.ctypes.data + SCALARS.itemsize
        self._call(
            "cublasGemmEx", operation[turn_b], operation[turn_a], N, M, K,
            alpha, b.data.ptr, kind, b.shape[1], a.data.ptr, kind, a.shape[1],
            beta, out.data.ptr, out_kind, N, self._compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
        self._device.account(out, a, b, self._workspace)
