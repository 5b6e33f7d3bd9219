"""The fake cuBLAS: results of products, and invalid calls that it rejects."""

import ctypes
import gc
import inspect

import numpy as np
import pytest
from support.fake_cupy import cublas, cupy, on_device, runtime

from llmc_cli.kernels.cuda.blas import INTERFACE, Blas
from llmc_cli.kernels.cuda.device import Device

pytestmark = pytest.mark.usefixtures("clear_streams")


def bits(values):
    """Round to nearest even and return the bits of bf16."""
    encoded = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((encoded + 0x7FFF + ((encoded >> 16) & 1)) >> 16).astype(np.uint16)


def floats(values):
    return (values.astype(np.uint32) << 16).view(np.float32)


def scalar(value):
    return np.array([value], np.float32)


ONE, ZERO = scalar(1), scalar(0)


@pytest.fixture
def handle():
    """Return a cuBLAS handle that does not round partial sums."""
    handle = cublas.create()
    cublas.set_math_mode(handle, 16)
    return handle


def product(handle, out, a, b, transpose_a=False, transpose_b=False, alpha=ONE, beta=ZERO, compute=68):
    """Compute row-major out = a · b as the column-major product of the transposes."""
    kind = {np.dtype(np.float32): 0, np.dtype(np.uint16): 14}
    k = a.shape[0] if transpose_a else a.shape[1]
    cublas.gemm(
        handle, int(transpose_b), int(transpose_a), out.shape[1], out.shape[0], k, alpha.ctypes.data,
        b.data.ptr, kind[b.dtype], b.shape[1], a.data.ptr, kind[a.dtype], a.shape[1], beta.ctypes.data,
        out.data.ptr, kind[out.dtype], out.shape[1], compute, -1,
    )  # fmt: skip


@pytest.mark.parametrize("transpose_a", [False, True])
@pytest.mark.parametrize("transpose_b", [False, True])
def test_product(handle, transpose_a, transpose_b):
    generator = np.random.default_rng(0)
    a = generator.standard_normal((5, 3) if transpose_a else (3, 5), np.float32)
    b = generator.standard_normal((4, 5) if transpose_b else (5, 4), np.float32)
    expected = (a.T if transpose_a else a) @ (b.T if transpose_b else b)
    out = cupy.empty((3, 4), np.float32)  # NaN, which is not read if beta is 0
    product(handle, out, on_device(a), on_device(b), transpose_a, transpose_b)
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-6)
    product(handle, out, on_device(a), on_device(b), transpose_a, transpose_b, scalar(2), scalar(0.5), 69)
    np.testing.assert_allclose(out.get(), 2.5 * expected, rtol=1e-5, atol=1e-6)
    product(handle, out, on_device(bits(a)), on_device(bits(b)), transpose_a, transpose_b)
    rounded_a, rounded_b = floats(bits(a)), floats(bits(b))
    expected = (rounded_a.T if transpose_a else rounded_a) @ (rounded_b.T if transpose_b else rounded_b)
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-6)
    narrow = cupy.empty((3, 4), np.uint16)
    product(handle, narrow, on_device(bits(a)), on_device(bits(b)), transpose_a, transpose_b)
    assert (narrow.get() == bits(out.get())).all()


def test_tf32_rounds_operands(handle):
    a = np.full((1, 1), 1 + 2.0**-11 + 2.0**-12, np.float32)
    out = cupy.empty((1, 1), np.float32)
    for compute, expected in ((68, a[0, 0]), (77, np.float32(1 + 2.0**-10))):
        product(handle, out, on_device(a), on_device(np.ones((1, 1), np.float32)), compute=compute)
        assert out.get()[0, 0] == expected
    product(handle, out, cupy.empty((1, 1), np.float32), on_device(a), compute=77)
    assert np.isnan(out.get()).all()


def test_product_runs_on_the_stream_of_its_handle(handle):
    """Without a stream, a handle uses the null stream and does not wait for other streams."""
    one = on_device(np.ones((1, 1), np.float32))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    for set_first, expected in ((False, True), (True, False)):
        if set_first:
            cublas.set_stream(handle, stream.ptr)
        out = cupy.empty((1, 1), np.float32)
        product(handle, out, one, one)
        assert np.isnan(out.get(stream)).all() == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lda": 2}, "lda 2"),
        ({"ldc": 2}, "ldc 2"),
        ({"C": 4}, "no allocation"),
        ({"A": 4}, "no allocation"),
        ({"Atype": 14}, "types"),
        ({"Ctype": 2}, "types"),
        ({"computeType": 70}, "computeType"),
        ({"alpha": None}, "on a device"),
        ({"algo": 99}, "algo"),
        ({"handle": 99}, "handle"),
        ({"transa": 2}, "transa"),
    ],
)
def test_invalid_products(handle, change, message):
    a, c = cupy.zeros((3, 3), np.float32), cupy.zeros((3, 3), np.float32)
    names = inspect.signature(cublas.gemm).parameters
    good = (handle, 0, 0, 3, 3, 3, ONE.ctypes.data, a.data.ptr, 0, 3, a.data.ptr, 0, 3, ZERO.ctypes.data)
    call = dict(zip(names, (*good, c.data.ptr, 0, 3, 68, -1), strict=True))
    for name, value in change.items():
        call[name] = a.data.ptr if value is None else call[name] + value if name in ("A", "C") else value
    with pytest.raises((cublas.CUBLASError, runtime.CUDARuntimeError), match=message):
        cublas.gemm(**call)


@pytest.mark.parametrize(("mode", "expected"), [(0, 3.0), (16, 3.015625)])
def test_reduced_precision_reduction(handle, mode, expected):
    """Partial sums may be rounded unless the mode forbids it: 1.0049 to 1.0078, 2.0049 to 2."""
    left, right = np.array([[1, 0.0048828125, 2, 0.0048828125]]), np.ones((4, 1))
    cublas.set_math_mode(handle, mode)
    out = cupy.empty((1, 1), np.uint16)
    product(handle, out, on_device(bits(left)), on_device(bits(right)))
    assert floats(out.get()) == expected


def test_backend_disables_reduced_precision_reduction(fake_cupy):
    multiply = Blas(Device(0, True), "bf16")
    left, right = np.array([[1, 0.0048828125, 2, 0.0048828125]]), np.ones((4, 1))
    out = cupy.empty((1, 1), np.uint16)
    multiply(out, on_device(bits(left)), on_device(bits(right)), False, False)
    assert floats(out.get()) == 3.015625


def test_c_interface(handle, capfd):
    """The library is found by name, and functions return a status and print errors to stderr."""
    library = ctypes.CDLL(f"libcublas.so.{runtime.runtimeGetVersion() // 1000}")
    for name, types in INTERFACE.items():
        getattr(library, name).argtypes = types
    one = on_device(np.full((1, 1), 3, np.float32))
    matrix = (one.data.ptr, 0, 1)
    call = (handle, 0, 0, 1, 1, 1, ONE.ctypes.data, *matrix, *matrix, ZERO.ctypes.data, *matrix, 68)
    assert library.cublasGemmEx(*call, -1) == 0
    assert one.get() == 9
    assert library.cublasGemmEx(*call, 5) == cublas.INVALID_VALUE
    assert library.cublasSetWorkspace_v2(handle, one.data.ptr + 4, 4) == cublas.INVALID_VALUE
    assert "algo 5" in capfd.readouterr().err


def test_capture_requires_a_workspace(handle):
    """Setting the stream resets the workspace. The graph uses the workspace."""
    stream = cupy.cuda.Stream(non_blocking=True)
    one, work = on_device(np.full((1, 1), 3, np.float32)), cupy.empty(256, np.uint8)
    cupy.cuda.Device().synchronize()
    cublas.set_workspace(handle, work.data.ptr, work.nbytes)
    cublas.set_stream(handle, stream.ptr)
    with stream:
        stream.begin_capture()
        with pytest.raises(cublas.CUBLASError, match="without a workspace"):
            product(handle, one, one, one)
        cublas.set_workspace(handle, work.data.ptr, work.nbytes)
        product(handle, one, one, one)
        graph = stream.end_capture()
        for expected in (9, 81):
            graph.launch()
            assert one.get() == expected
        cublas.set_stream(handle, stream.ptr)
        del work
        gc.collect()
        with pytest.raises(runtime.CUDARuntimeError, match="freed"):
            graph.launch()
