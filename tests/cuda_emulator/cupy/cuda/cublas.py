"""Matrix products of cuBLAS on NumPy. Column-major, as cuBLAS is; operands by address."""

import ctypes

import numpy as np

from cupy._status import current, require_device
from cupy.cuda import memory, stream
from cupy.cuda.runtime import CUDA_R_16BF, CUDA_R_32F, owner_of

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_DEFAULT_MATH = 0
CUBLAS_COMPUTE_32F = 68
CUBLAS_COMPUTE_32F_PEDANTIC = 69
CUBLAS_COMPUTE_32F_FAST_TF32 = 77
CUBLAS_GEMM_DEFAULT = -1

TF32_TENSOR_OP_MATH = 3  # CuPy has no name for it
DTYPES = {CUDA_R_32F: np.dtype(np.float32), CUDA_R_16BF: np.dtype(np.uint16)}


class CUBLASError(RuntimeError):
    def __init__(self, why):
        super().__init__(f"CUBLAS_STATUS_INVALID_VALUE ({why})")


class _Handle:
    def __init__(self):
        self.device = current.device
        self.stream = 0  # the null stream, until setStream
        self.mode = CUBLAS_DEFAULT_MATH


_handles = {}


def create():
    require_device(current.device)
    number = len(_handles) + 1
    _handles[number] = _Handle()
    return number


def destroy(handle):
    _find(handle)
    _handles[handle] = None


def setStream(handle, stream):
    _find(handle).stream = stream


def setMathMode(handle, mode):
    if mode not in (CUBLAS_DEFAULT_MATH, TF32_TENSOR_OP_MATH):
        raise CUBLASError(f"math mode {mode}")
    _find(handle).mode = mode


def _find(handle):
    found = _handles.get(handle)
    if found is None or found.device != current.device:
        raise CUBLASError(f"{handle!r} is no handle of device {current.device}")
    return found


def gemmEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo
):  # fmt: skip
    """C (m,n) = alpha · op(A) (m,k) · op(B) (k,n) + beta · C; alpha and beta by the address of a float32."""
    gemmStridedBatchedEx(
        handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B, Btype, ldb, 0, beta, C, Ctype, ldc, 0, 1,
        computeType, algo,
    )  # fmt: skip


def gemmStridedBatchedEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB,
    beta, C, Ctype, ldc, strideC, batchCount, computeType, algo,
):  # fmt: skip
    """``gemmEx`` ``batchCount`` times, each operand its stride (in elements) further on."""
    found = _find(handle)
    if transa not in (CUBLAS_OP_N, CUBLAS_OP_T) or transb not in (CUBLAS_OP_N, CUBLAS_OP_T):
        raise CUBLASError(f"transa {transa}, transb {transb}")
    if algo != CUBLAS_GEMM_DEFAULT:
        raise CUBLASError(f"algo {algo}")
    _check_types(Atype, Btype, Ctype, computeType)
    if min(m, n, k, batchCount) < 1:
        raise CUBLASError(f"m {m}, n {n}, k {k}, batchCount {batchCount}")
    factors = [_scalar(address) for address in (alpha, beta)]
    a = _Operand("A", A, Atype, (m, k) if transa == CUBLAS_OP_N else (k, m), lda, strideA, batchCount)
    b = _Operand("B", B, Btype, (k, n) if transb == CUBLAS_OP_N else (n, k), ldb, strideB, batchCount)
    c = _Operand("C", C, Ctype, (m, n), ldc, strideC, batchCount)
    interleaved = strideC >= m and ldc >= (batchCount - 1) * strideC + m
    if batchCount > 1 and strideC < (n - 1) * ldc + m and not interleaved:
        raise CUBLASError(f"strideC {strideC}: the results of a batch overlap")
    tf32 = Atype == CUDA_R_32F and (
        computeType == CUBLAS_COMPUTE_32F_FAST_TF32
        or (computeType == CUBLAS_COMPUTE_32F and found.mode == TF32_TENSOR_OP_MATH)
    )

    def run():
        left, right = a.values(tf32), b.values(tf32)
        product = np.matmul(
            left.swapaxes(1, 2) if transa else left,
            right.swapaxes(1, 2) if transb else right,
        )
        product *= factors[0]
        if factors[1] != 0:  # cuBLAS does not read C otherwise: NaN there stays without effect
            product += factors[1] * c.values()
        c.store(product)

    queue = stream.queue_of(found.stream)
    if queue.nodes is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")  # as CuPy does
    queue.add(run, [a.owner, b.owner, c.owner])


def _check_types(a, b, c, compute):
    """The combinations of cublasGemmEx's table that are in use."""
    known = {CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC}
    if (a, b, c) == (CUDA_R_32F, CUDA_R_32F, CUDA_R_32F):
        known.add(CUBLAS_COMPUTE_32F_FAST_TF32)
    elif (a, b) != (CUDA_R_16BF, CUDA_R_16BF) or c not in DTYPES:
        raise CUBLASError(f"types A {a}, B {b}, C {c}")
    if compute not in known:
        raise CUBLASError(f"computeType {compute} for types A {a}, B {b}, C {c}")


def _scalar(address):
    if memory.on_device.find(address, 1) is not None:
        raise CUBLASError("alpha and beta are read on the host, and this one is on a device")
    return np.float32(ctypes.c_float.from_address(address).value)


class _Operand:
    """A batch of column-major matrices, checked to lie in memory that is alive."""

    def __init__(self, name, address, kind, shape, leading, stride, count):
        rows, columns = shape
        self.dtype = DTYPES[kind]
        size = self.dtype.itemsize
        if leading < rows:
            raise CUBLASError(f"ld{name.lower()} {leading} is less than {rows} rows")
        if stride < 0 or address % size:
            raise CUBLASError(f"{name}: stride {stride}, address {address:#x}")
        self.elements = (count - 1) * stride + (columns - 1) * leading + rows
        self.address = address
        self.shape = (count, rows, columns)
        self.strides = (stride * size, size, leading * size)
        self.owner = owner_of(address, self.elements * size, name)

    def _array(self):
        nbytes = self.elements * self.dtype.itemsize
        flat = np.frombuffer((ctypes.c_ubyte * nbytes).from_address(self.address), self.dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides)

    def values(self, tf32=False):
        """float32 (count, rows, columns)."""
        found = self._array()
        if self.dtype == np.uint16:
            return (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return _round(found, 13) if tf32 else found

    def store(self, product):
        if self.dtype == np.uint16:
            product = (_round(product, 16).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        self._array()[...] = product


def _round(values, bits):
    """float32 with the last ``bits`` bits of the mantissa rounded off, to nearest, ties to even; NaN stays NaN."""
    whole = np.ascontiguousarray(values).view(np.uint32)
    half = np.uint32((1 << (bits - 1)) - 1)
    last = (whole >> np.uint32(bits)) & np.uint32(1)
    rounded = (whole + half + last) & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)
    return np.where(np.isnan(values), np.uint32(0x7FC00000), rounded).view(np.float32)
