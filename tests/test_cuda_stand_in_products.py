"""cuBLAS of the stand-in for CuPy, on NumPy: results, and products that are refused."""

import numpy as np
import pytest
from cuda_stand_in import cublas, cupy, on_device, runtime
from cupy_calls import CALLS, parameters

pytestmark = pytest.mark.usefixtures("nothing_waits")


def bits(values):
    """bf16, to nearest even."""
    whole = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16).astype(np.uint16)


def floats(values):
    return (values.astype(np.uint32) << 16).view(np.float32)


def scalar(value):
    return np.array([value], np.float32)


ONE, ZERO = scalar(1), scalar(0)


@pytest.fixture
def handle():
    number = cublas.create()
    yield number
    cublas.destroy(number)


def product(handle, out, a, b, turn_a=False, turn_b=False, alpha=ONE, beta=ZERO, compute=68):
    """Row-major out = a · b, by its transpose."""
    kind = {np.dtype(np.float32): 0, np.dtype(np.uint16): 14}
    k = a.shape[0] if turn_a else a.shape[1]
    cublas.gemmEx(
        handle, int(turn_b), int(turn_a), out.shape[1], out.shape[0], k, alpha.ctypes.data,
        b.data.ptr, kind[b.dtype], b.shape[1], a.data.ptr, kind[a.dtype], a.shape[1], beta.ctypes.data,
        out.data.ptr, kind[out.dtype], out.shape[1], compute, -1,
    )  # fmt: skip


@pytest.mark.parametrize("turn_a", [False, True])
@pytest.mark.parametrize("turn_b", [False, True])
def test_product(handle, turn_a, turn_b):
    generator = np.random.default_rng(0)
    a = generator.standard_normal((5, 3) if turn_a else (3, 5), np.float32)
    b = generator.standard_normal((4, 5) if turn_b else (5, 4), np.float32)
    expected = (a.T if turn_a else a) @ (b.T if turn_b else b)
    out = cupy.empty((3, 4), np.float32)  # NaN, which beta 0 does not read
    product(handle, out, on_device(a), on_device(b), turn_a, turn_b)
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-6)
    product(handle, out, on_device(a), on_device(b), turn_a, turn_b, scalar(2), scalar(0.5), 69)
    np.testing.assert_allclose(out.get(), 2.5 * expected, rtol=1e-5, atol=1e-6)
    product(handle, out, on_device(bits(a)), on_device(bits(b)), turn_a, turn_b)
    rounded_a, rounded_b = floats(bits(a)), floats(bits(b))
    expected = (rounded_a.T if turn_a else rounded_a) @ (rounded_b.T if turn_b else rounded_b)
    np.testing.assert_allclose(out.get(), expected, rtol=1e-5, atol=1e-6)
    narrow = cupy.empty((3, 4), np.uint16)
    product(handle, narrow, on_device(bits(a)), on_device(bits(b)), turn_a, turn_b)
    assert (narrow.get() == bits(out.get())).all()


def test_tf32_rounds_what_it_multiplies(handle):
    a = np.full((1, 1), 1 + 2.0**-11 + 2.0**-12, np.float32)
    out = cupy.empty((1, 1), np.float32)
    for compute, expected in ((68, a[0, 0]), (77, np.float32(1 + 2.0**-10))):
        product(handle, out, on_device(a), on_device(np.ones((1, 1), np.float32)), compute=compute)
        assert out.get()[0, 0] == expected
    cublas.setMathMode(handle, 3)
    product(handle, out, on_device(a), on_device(np.ones((1, 1), np.float32)))
    assert out.get()[0, 0] == np.float32(1 + 2.0**-10)
    product(handle, out, cupy.empty((1, 1), np.float32), on_device(a), compute=77)
    assert np.isnan(out.get()).all()


def test_strided_batch(handle):
    """Two heads of (B,T,2·HS), interleaved, times matrices of their own."""
    generator = np.random.default_rng(1)
    x, w = generator.standard_normal((6, 2, 4), np.float32), generator.standard_normal((2, 4, 4), np.float32)
    out = cupy.empty((6, 2, 4), np.float32)
    cublas.gemmStridedBatchedEx(
        handle, 0, 0, 4, 6, 4, ONE.ctypes.data, on_device(w).data.ptr, 0, 4, 16, on_device(x).data.ptr, 0, 8, 4,
        ZERO.ctypes.data, out.data.ptr, 0, 8, 4, 2, 68, -1,
    )  # fmt: skip
    np.testing.assert_allclose(out.get(), np.einsum("thi,hio->tho", x, w), rtol=1e-5, atol=1e-6)


def test_product_runs_on_the_stream_of_its_handle(handle):
    """A handle that nobody gave a stream uses the null stream, and does not wait for another one."""
    one = on_device(np.ones((1, 1), np.float32))
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    for set_first, expected in ((False, True), (True, False)):
        if set_first:
            cublas.setStream(handle, stream.ptr)
        out = cupy.empty((1, 1), np.float32)
        product(handle, out, one, one)
        assert np.isnan(out.get(stream)).all() == expected


@pytest.mark.parametrize(
    "change, said",
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
def test_products_that_are_refused(handle, change, said):
    a, c = cupy.zeros((3, 3), np.float32), cupy.zeros((3, 3), np.float32)
    names = parameters(CALLS["cuda.cublas.gemmEx"])[0]
    good = (handle, 0, 0, 3, 3, 3, ONE.ctypes.data, a.data.ptr, 0, 3, a.data.ptr, 0, 3, ZERO.ctypes.data)
    call = dict(zip(names, (*good, c.data.ptr, 0, 3, 68, -1), strict=True))
    for name, value in change.items():
        call[name] = a.data.ptr if value is None else call[name] + value if name in ("A", "C") else value
    with pytest.raises((cublas.CUBLASError, runtime.CUDARuntimeError), match=said):
        cublas.gemmEx(**call)
