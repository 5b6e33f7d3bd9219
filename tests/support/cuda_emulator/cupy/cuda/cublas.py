"""Column-major matrix products of cuBLAS, computed by NumPy; operands are given by address.

The backend creates handles with CuPy and calls the other functions through cuBLAS's C interface, because CuPy's own
functions cannot be captured and reset the workspace that captured products need. ``ctypes.CDLL`` finds this module's
functions under the name of the library that CuPy loads.
"""

import ctypes
import traceback
from types import SimpleNamespace

import numpy as np

from cupy._status import RUNTIME_VERSION, current, require_device
from cupy.cuda import memory, stream
from cupy.cuda.runtime import CUDA_R_16BF, CUDA_R_32F, owner_of

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_COMPUTE_32F = 68
CUBLAS_COMPUTE_32F_PEDANTIC = 69
CUBLAS_COMPUTE_32F_FAST_TF32 = 77
CUBLAS_GEMM_DEFAULT = -1
CUBLAS_DEFAULT_MATH, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 0, 16

INVALID_VALUE = 7  # CUBLAS_STATUS_INVALID_VALUE
DTYPES = {CUDA_R_32F: np.dtype(np.float32), CUDA_R_16BF: np.dtype(np.uint16)}


class CUBLASError(RuntimeError):
    def __init__(self, why):
        super().__init__(f"CUBLAS_STATUS_INVALID_VALUE ({why})")


class _Handle:
    def __init__(self):
        self.device = current.device
        self.stream = 0  # the null stream
        self.workspace = None  # an Allocation
        self.float32_reduction = False  # whether partial sums over K are added in float32


_handles = {}


def create():
    require_device(current.device)
    number = len(_handles) + 1
    _handles[number] = _Handle()
    return number


def _find(handle):
    found = _handles.get(handle)
    if found is None or found.device != current.device:
        raise CUBLASError(f"{handle!r} is no handle of device {current.device}")
    return found


def set_stream(handle, pointer):
    """Set the stream and reset the workspace, as cuBLAS does."""
    found = _find(handle)
    found.stream, found.workspace = pointer or 0, None


def set_math_mode(handle, mode):
    if mode not in (CUBLAS_DEFAULT_MATH, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION):
        raise CUBLASError(f"mode {mode}")
    _find(handle).float32_reduction = mode == CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION


def set_workspace(handle, address, nbytes):
    if address is None or address % 256:
        raise CUBLASError(f"workspace {address!r} is not aligned to 256 bytes")
    _find(handle).workspace = owner_of(address, nbytes, "workspace")


def gemm(handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType, algo):
    """Compute C (m,n) = alpha · op(A) (m,k) · op(B) (k,n) + beta · C; alpha and beta are addresses of float32."""
    found = _find(handle)
    if transa not in (CUBLAS_OP_N, CUBLAS_OP_T) or transb not in (CUBLAS_OP_N, CUBLAS_OP_T):
        raise CUBLASError(f"transa {transa}, transb {transb}")
    if algo != CUBLAS_GEMM_DEFAULT:
        raise CUBLASError(f"algo {algo}")
    _check_types(Atype, Btype, Ctype, computeType)
    if min(m, n, k) < 1:
        raise CUBLASError(f"m {m}, n {n}, k {k}")
    factors = [_scalar(address) for address in (alpha, beta)]
    a = _Operand("A", A, Atype, (m, k) if transa == CUBLAS_OP_N else (k, m), lda)
    b = _Operand("B", B, Btype, (k, n) if transb == CUBLAS_OP_N else (n, k), ldb)
    c = _Operand("C", C, Ctype, (m, n), ldc)
    tf32 = computeType == CUBLAS_COMPUTE_32F_FAST_TF32
    float32_reduction = found.float32_reduction

    def run():
        left, right = a.values(tf32), b.values(tf32)
        left, right = left.T if transa else left, right.T if transb else right
        exact = float32_reduction or c.dtype == np.float32
        product = np.matmul(left, right) if exact else _split_k(left, right)
        product *= factors[0]
        if factors[1] != 0:  # like cuBLAS, do not read C otherwise: it may contain NaN
            product += factors[1] * c.values()
        c.store(product)

    queue = stream.queue_of(found.stream)
    owners = [a.owner, b.owner, c.owner]
    if found.workspace is not None:
        owners.append(found.workspace)
    elif queue.nodes is not None:
        raise CUBLASError("captured without a workspace, cuBLAS would allocate one in the graph")
    queue.add(run, owners)


def _split_k(left, right):
    """Return the product split along K, as cuBLAS may do, with the parts rounded to bfloat16 before they are added."""
    middle = left.shape[1] // 2
    return _round(left[:, :middle] @ right[:middle], 16) + _round(left[:, middle:] @ right[middle:], 16)


def _check_types(a, b, c, compute):
    """Raise an error unless the types are a supported combination of cublasGemmEx that the backend uses."""
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
    """A column-major matrix, checked to lie in allocated device memory."""

    def __init__(self, name, address, kind, shape, leading):
        rows, columns = shape
        self.dtype = DTYPES[kind]
        size = self.dtype.itemsize
        if leading < rows:
            raise CUBLASError(f"ld{name.lower()} {leading} is less than {rows} rows")
        if address % size:
            raise CUBLASError(f"{name}: address {address:#x}")
        self.elements = (columns - 1) * leading + rows
        self.address, self.shape, self.strides = address, shape, (size, leading * size)
        self.owner = owner_of(address, self.elements * size, name)

    def _array(self):
        nbytes = self.elements * self.dtype.itemsize
        flat = np.frombuffer((ctypes.c_ubyte * nbytes).from_address(self.address), self.dtype)
        return np.lib.stride_tricks.as_strided(flat, self.shape, self.strides)

    def values(self, tf32=False):
        """Return the elements as float32 (rows, columns), rounded to TF32 if ``tf32``."""
        found = self._array()
        if self.dtype == np.uint16:
            return (found.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return _round(found, 13) if tf32 else found

    def store(self, product):
        if self.dtype == np.uint16:
            product = (_round(product, 16).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        self._array()[...] = product


def _round(values, bits):
    """Round float32 values to nearest even, clearing the last ``bits`` bits of the mantissa. NaN remains NaN."""
    encoded = np.ascontiguousarray(values).view(np.uint32)
    half = np.uint32((1 << (bits - 1)) - 1)
    last = (encoded >> np.uint32(bits)) & np.uint32(1)
    rounded = (encoded + half + last) & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)
    return np.where(np.isnan(values), np.uint32(0x7FC00000), rounded).view(np.float32)


def _exported(types, function):
    """Return a C function that calls ``function`` and returns a status. Exceptions cannot pass through C: they are
    printed."""

    def call(*arguments):
        try:
            function(*arguments)
        except Exception:
            traceback.print_exc()
            return INVALID_VALUE
        return 0

    return ctypes.CFUNCTYPE(ctypes.c_int, *types)(call)


POINTER, INT = ctypes.c_void_p, ctypes.c_int
MATRIX = (POINTER, INT, INT)  # address, type, leading dimension
library = SimpleNamespace(
    cublasSetStream_v2=_exported((POINTER, POINTER), set_stream),
    cublasSetMathMode=_exported((POINTER, INT), set_math_mode),
    cublasSetWorkspace_v2=_exported((POINTER, POINTER, ctypes.c_size_t), set_workspace),
    cublasGemmEx=_exported((POINTER, *[INT] * 5, POINTER, *MATRIX, *MATRIX, POINTER, *MATRIX, INT, INT), gemm),
)


class CDLL(ctypes.CDLL):
    """``ctypes.CDLL`` that returns ``library`` for the name of the cuBLAS library."""

    def __new__(cls, name=None, *args, **kwargs):
        return library if name == f"libcublas.so.{RUNTIME_VERSION // 1000}" else super().__new__(cls)


ctypes.CDLL = CDLL
