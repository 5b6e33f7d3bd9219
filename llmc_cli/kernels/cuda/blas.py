"""Products of row-major matrices by cuBLAS, which thinks in columns."""

from typing import Any

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.spec import Array

COMPUTE = {"fp32": "CUBLAS_COMPUTE_32F_PEDANTIC", "tf32": "CUBLAS_COMPUTE_32F_FAST_TF32", "bf16": "CUBLAS_COMPUTE_32F"}
"""By precision, all with sums in float32 (of a product divided along K, cuBLAS may add the parts in that of ``out``);
PEDANTIC lets nothing be rounded before it is multiplied."""

TYPES = {np.dtype(np.float32): 0, np.dtype(np.uint16): 14}
"""cudaDataType: CUDA_R_32F; and CUDA_R_16BF, whose bits NumPy can only keep as uint16."""

SCALARS = np.array([0.0, 1.0], np.float32)  # beta and alpha, read by address when a product is asked for


class Blas:
    """``precision``: fp32, tf32 or bf16, in which operands are multiplied. ``products``: how many were asked for."""

    def __init__(self, device: Device, precision: str) -> None:
        self._device = device
        self._cublas: Any = device.cublas()
        self._compute: int = getattr(self._cublas, COMPUTE[precision])
        self._handle: int = self._cublas.create()
        self._cublas.setStream(self._handle, device.stream.ptr)
        self.products = 0

    def __call__(self, out: Array, a: Array, b: Array, turn_a: bool, turn_b: bool, acc: bool = False) -> None:
        """out (M,N) = a (M,K) · b (K,N), added to with ``acc``; ``turn_a``: a is given as (K,M), ``turn_b``: b as
        (N,K). a and b are of one dtype, out may be float32 where they are bfloat16.

        A row-major matrix is, in columns, its transpose. So this asks for outᵀ = bᵀ · aᵀ.
        """
        cublas = self._cublas
        M, N = out.shape
        K = a.shape[0] if turn_a else a.shape[1]
        kind, out_kind = TYPES[np.dtype(a.dtype)], TYPES[np.dtype(out.dtype)]
        operation = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}
        beta, alpha = SCALARS.ctypes.data + SCALARS.itemsize * acc, SCALARS.ctypes.data + SCALARS.itemsize
        cublas.gemmEx(
            self._handle, operation[turn_b], operation[turn_a], N, M, K,
            alpha, b.data.ptr, kind, b.shape[1], a.data.ptr, kind, a.shape[1],
            beta, out.data.ptr, out_kind, N, self._compute, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
        self._device.launches += 1
        self.products += 1
