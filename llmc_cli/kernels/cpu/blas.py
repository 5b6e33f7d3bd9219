"""The one BLAS of the process: SciPy's, called with alpha, beta and leading dimensions, which NumPy does not offer.

beta = 1 accumulates gradients without scratch memory, and leading dimensions let views be operands without copies.
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
    """The Fortran routine behind scipy.linalg.cython_blas. Raises MissingError where its integers are not 32 bits."""
    routines: Any = scipy.linalg.cython_blas.__pyx_capi__
    capsule = routines[name]
    get_name = ctypes.pythonapi.PyCapsule_GetName
    get_name.restype, get_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    signature: bytes = get_name(capsule)
    if signature.count(b" int *") != argument_types.count(INTEGER):
        raise MissingError(f"SciPy's BLAS takes integers of another size ({signature.decode()}): install another SciPy")
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
    """``matmul.Matmul``. BLAS counts in columns: it is given cᵀ = bᵀ · aᵀ, whose columns are these rows."""
    if bias is not None:  # the product is then added to it, which costs BLAS no more than overwriting
        linear.fill_rows(c, bias)
        acc = True
    M, N = c.shape
    K = a.shape[0] if transpose_a else a.shape[1]
    if M == 1 and transpose_b and not transpose_a:
        # a token at a time: sgemm would copy the whole matrix into its blocks first, which takes three times as long
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
    """Elements from row to row; with one row NumPy may say anything, BLAS wants at least the row's length."""
    return int(max(x.strides[0] // 4, x.shape[1]))


def library() -> dict[str, Any]:
    """Name, version, architecture and threads of the BLAS in use, as threadpoolctl says it; empty where it cannot."""
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    ours = [pool for pool in pools if "scipy" in pool["filepath"].replace("\\", "/").split("/")[-2]]
    return next(iter(ours or pools), {})


def name() -> str:
    """The BLAS in use: library, version, the architecture it chose."""
    described = library()
    parts = [
        str(described.get("internal_api", "unknown BLAS")),
        described.get("version"),
        described.get("architecture"),
    ]
    return " ".join(part for part in parts if part)


def limit_threads(threads: int) -> None:
    """Use this many threads from now on (where the library can be told: Apple's Accelerate decides by itself)."""
    threadpoolctl.threadpool_limits(threads, user_api="blas")
