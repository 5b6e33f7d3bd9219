"""SciPy's BLAS, the only one that this process uses, called with beta and leading dimensions, which NumPy does not
offer.

beta = 1 accumulates gradients without scratch memory; leading dimensions allow views as operands without copies.
"""

import ctypes
from typing import Any

import numpy as np
import scipy.linalg.cython_blas
import threadpoolctl
from numpy.typing import NDArray

from llmc_cli.errors import MissingError
from llmc_cli.kernels.cpu import linear

Float32 = NDArray[np.float32]


def _routine(name: str, argument_types: list[Any]) -> Any:
    """Return a Fortran routine of scipy.linalg.cython_blas. Raises MissingError if its integers are not 32-bit."""
    routines: Any = scipy.linalg.cython_blas.__pyx_capi__
    capsule = routines[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    signature: bytes = get_name(capsule)
    if signature.count(b" int *") != argument_types.count(INTEGER):
        raise MissingError(
            f"SciPy's BLAS does not use 32-bit integers ({signature.decode()}); install a SciPy built with LP64 BLAS"
        )
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *argument_types)(get_pointer(capsule, signature))


INTEGER = ctypes.POINTER(ctypes.c_int)
NUMBER = ctypes.POINTER(ctypes.c_float)
_sgemm = _routine(
    "sgemm",
    [ctypes.c_char_p, ctypes.c_char_p, INTEGER, INTEGER, INTEGER, NUMBER, ctypes.c_void_p, INTEGER,
     ctypes.c_void_p, INTEGER, NUMBER, ctypes.c_void_p, INTEGER],
)  # fmt: skip
_sgemv = _routine(
    "sgemv",
    [ctypes.c_char_p, INTEGER, INTEGER, NUMBER, ctypes.c_void_p, INTEGER, ctypes.c_void_p, INTEGER,
     NUMBER, ctypes.c_void_p, INTEGER],
)  # fmt: skip


def matmul(
    c: Float32, a: Float32, b: Float32, transpose_a: bool, transpose_b: bool, acc: bool, bias: Float32 | None
) -> None:
    """c (M,N) = a · b + bias (N,), or added to c with ``acc``; see ``matmul.Matmul``.

    BLAS is column-major, so it computes cᵀ = bᵀ · aᵀ.
    """
    if bias is not None:  # BLAS adds as fast as it overwrites
        linear.fill_rows(c, bias)
        acc = True
    M, N = c.shape
    K = a.shape[0] if transpose_a else a.shape[1]
    if M == 1 and transpose_b and not transpose_a:
        # a single token: sgemm would pack the whole matrix first, which takes three times as long
        _sgemv(
            b"T",
            ctypes.c_int(K),
            ctypes.c_int(N),
            ctypes.c_float(1.0),
            b.ctypes.data,
            ctypes.c_int(_leading(b)),
            a.ctypes.data,
            ctypes.c_int(1),
            ctypes.c_float(1.0 if acc else 0.0),
            c.ctypes.data,
            ctypes.c_int(1),
        )
        return
    _sgemm(
        b"T" if transpose_b else b"N",
        b"T" if transpose_a else b"N",
        ctypes.c_int(N),
        ctypes.c_int(M),
        ctypes.c_int(K),
        ctypes.c_float(1.0),
        b.ctypes.data,
        ctypes.c_int(_leading(b)),
        a.ctypes.data,
        ctypes.c_int(_leading(a)),
        ctypes.c_float(1.0 if acc else 0.0),
        c.ctypes.data,
        ctypes.c_int(_leading(c)),
    )


def _leading(x: Float32) -> int:
    """Return the elements from row to row. For a single row NumPy's stride is arbitrary, but BLAS requires at least the
    length of the row."""
    return int(max(x.strides[0] // 4, x.shape[1]))


def library() -> dict[str, Any]:
    """Return threadpoolctl's description of the BLAS in use, or an empty dict."""
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    scipys = [pool for pool in pools if "scipy" in pool["filepath"].replace("\\", "/").split("/")[-2]]
    return next(iter(scipys or pools), {})


def name() -> str:
    """Return library, version and architecture of the BLAS in use."""
    described = library()
    parts = [
        str(described.get("internal_api", "unknown BLAS")),
        described.get("version"),
        described.get("architecture"),
    ]
    return " ".join(part for part in parts if part)


def limit_threads(threads: int) -> None:
    """Set the number of BLAS threads. Some libraries, such as Apple's Accelerate, ignore it."""
    threadpoolctl.threadpool_limits(threads, user_api="blas")
