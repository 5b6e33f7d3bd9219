"""Products of row-major matrices with cuBLAS, which is column-major.

CuPy creates the handle; the products call cuBLAS's C interface directly. cuBLAS calls can be captured in a CUDA graph
if the caller provides the workspace, but CuPy's wrappers refuse to run during capture and reset the workspace on every
call.
"""

import ctypes
from typing import Any

import numpy as np

from llmc_cli.kernels.cuda.device import CublasError, Device
from llmc_cli.kernels.spec import Array

COMPUTE = {"fp32": "CUBLAS_COMPUTE_32F_PEDANTIC", "tf32": "CUBLAS_COMPUTE_32F_FAST_TF32", "bf16": "CUBLAS_COMPUTE_32F"}
"""cublasComputeType_t by precision, all with float32 accumulation. PEDANTIC does not round operands."""

FLOAT32_REDUCTION = 16
"""CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION: partial sums of a product split along K stay float32."""

TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 14}
"""cudaDataType: CUDA_R_32F and CUDA_R_16BF. bfloat16 bits are stored as uint16 in NumPy."""

SCALARS = np.array([0.0, 1.0], np.float32)  # host values of beta and alpha, passed by address

POINTER, INT = ctypes.c_void_p, ctypes.c_int
INTERFACE = {
    "cublasSetStream_v2": (POINTER, POINTER),  # handle, stream
    "cublasSetMathMode": (POINTER, INT),  # handle, mode
    "cublasSetWorkspace_v2": (POINTER, POINTER, ctypes.c_size_t),  # handle, memory, bytes
    "cublasGemmEx": (
        *(POINTER, INT, INT, INT, INT, INT),  # handle, transa, transb, m, n, k
        *(POINTER, POINTER, INT, INT, POINTER, INT, INT),  # alpha, A, its type and leading dimension, the same for B
        *(POINTER, POINTER, INT, INT, INT, INT),  # beta, C, its type and leading dimension, computeType, algorithm
    ),
}
"""The cuBLAS functions in use and their argument types. All return a status. Unchanged since CUDA 11."""

WORKSPACE = 4 << 20  # bytes, as NVIDIA recommends
HOPPER_WORKSPACE, HOPPER = 32 << 20, 90  # bytes from this compute capability on


class Blas:
    """Matrix products in ``precision``: fp32, tf32 or bf16. The first product allocates ``workspace_bytes``."""

    def __init__(self, device: Device, precision: str) -> None:
        self._device = device
        self._cublas: Any = device.cublas()
        self._library: Any = device.cublas_library()
        for name, types in INTERFACE.items():
            getattr(self._library, name).argtypes = types
        self._compute: int = getattr(self._cublas, COMPUTE[precision])
        self._handle: int = self._cublas.create()
        self.workspace_bytes = HOPPER_WORKSPACE if device.capability >= HOPPER else WORKSPACE
        self._workspace: Array | None = None

    def _configure(self) -> None:
        self._workspace = self._device.alloc((self.workspace_bytes,), np.uint8)
        self._call("cublasSetMathMode", FLOAT32_REDUCTION)
        self._call("cublasSetStream_v2", self._device.stream.ptr)  # before the workspace, which this call resets
        self._call("cublasSetWorkspace_v2", self._workspace.data.ptr, self.workspace_bytes)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(self._handle, *arguments)
        if status:
            raise CublasError(f"{name} failed with cuBLAS status {status}")

    def __call__(self, out: Array, a: Array, b: Array, transpose_a: bool, transpose_b: bool, acc: bool = False) -> None:
        """out (M,N) = a (M,K) · b (K,N), overwritten, or added to with ``acc``. With ``transpose_a``, a is stored as
        (K,M); with ``transpose_b``, b as (N,K). a and b have the same dtype; out may be float32 if they are bfloat16.

        A row-major matrix is its transpose in column-major order, so cuBLAS computes outᵀ = bᵀ · aᵀ.
        """
        if self._workspace is None:
            self._configure()
        cublas = self._cublas
        M, N = out.shape
        K = a.shape[0] if transpose_a else a.shape[1]
        kind, out_kind = TYPES[np.dtype(a.dtype)], TYPES[np.dtype(out.dtype)]
        operation = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}
        beta, alpha = SCALARS.ctypes.data + SCALARS.itemsize * acc, SCALARS.ctypes.data + SCALARS.itemsize
        self._call(
            "cublasGemmEx", operation[transpose_b], operation[transpose_a], N, M, K,
            alpha, b.data.ptr, kind, b.shape[1], a.data.ptr, kind, a.shape[1],
            beta, out.data.ptr, out_kind, N, self._compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
        self._device.record_launch(out, a, b, self._workspace)
