"""The stand-in for CuPy: that it is no more than what is used of CuPy, and stricter."""

import ast
import ctypes
import gc
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import stand_in
from cuda_emulator.architectures import blocks_at_once
from cupy_calls import ATTRIBUTES, CALLS, CONSTANTS, DEVICE_ATTRIBUTES, ERRORS, parameters, resolve

from llmc_cli.kernels.cuda import blas, device

cupy = stand_in.load()
runtime, cublas = cupy.cuda.runtime, cupy.cuda.cublas
raw = cupy._raw

NAN = np.float32(np.nan)


@pytest.fixture(autouse=True)
def nothing_waits():
    yield
    cupy.cuda.stream.abandon()


class Compiled:
    """In the place of a compiled program: ``double`` (float* x, int n, long long, float) doubles x."""

    names = ("double",)

    def __init__(self, source, options, check):
        self.options, self.check = options, check

    def signature(self, name):
        return ["P", "i4", "i8", "f4"]

    def launch(self, name, grid, block, args, shared):
        values = np.frombuffer((ctypes.c_float * int(args[1])).from_address(args[0]), np.float32)
        np.multiply(values, 2, out=values)


def without_a_compiler(monkeypatch):
    monkeypatch.setattr(raw.emulator, "Program", Compiled)
    monkeypatch.setattr(raw.memory, "tell_kernels", lambda: None)


@pytest.fixture
def double(monkeypatch):
    without_a_compiler(monkeypatch)
    kernel = cupy.RawModule(code="", options=("-std=c++17",)).get_function("double")
    return lambda x, **options: kernel((1,), (32,), (x, np.int32(x.size), np.int64(0), np.float32(0)), **options)


@pytest.fixture
def kernel(monkeypatch):
    without_a_compiler(monkeypatch)
    return cupy.RawModule(code="").get_function("double")


def on_device(values):
    values = np.asarray(values)
    array = cupy.empty(values.shape, values.dtype)
    array.set(values)
    return array


def pinned(count, dtype=np.float32):
    memory = cupy.cuda.alloc_pinned_memory(count * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, count)


# the table


def found(name):
    return raw.RawKernel if name == "RawKernel" else resolve(cupy, name)


@pytest.mark.parametrize("name", CALLS)
def test_call_has_its_parameters(name):
    first, _, rest = name.partition(".")
    called = resolve(found(first), rest) if rest else found(first)
    mine = [each for each in inspect.signature(called).parameters.values() if each.name != "self"]
    by_position, by_name = parameters(CALLS[name])
    names = [("*" if each.kind is each.VAR_POSITIONAL else "") + each.name for each in mine]
    assert names == by_position + by_name
    assert all(each.kind is each.KEYWORD_ONLY for each in mine if each.name in by_name)


@pytest.mark.parametrize("name", (*ATTRIBUTES, *ERRORS))
def test_attribute_exists(name):
    first, _, rest = name.partition(".")
    assert resolve(found(first), rest) is not None


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_has_its_value(name):
    assert resolve(cupy, name) == CONSTANTS[name]


def test_the_backend_uses_nothing_else():
    """Every name that hangs on cupy, runtime or cublas in the modules that call CuPy is in the table."""
    known = {
        ".".join(name.split(".")[:depth])
        for name in (*CALLS, *ATTRIBUTES, *ERRORS, *CONSTANTS)
        for depth in range(1, name.count(".") + 2)
    }
    used = set(blas.COMPUTE.values())
    assert {f"cuda.cublas.{name}" for name in used} <= known
    for module in (device, blas):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            chain = re.fullmatch(r"(?:self\.)?_?(cupy|runtime|cublas)\.([\w.]+)", ast.unparse(node))
            if isinstance(node, ast.Attribute) and chain:
                used.add({"cupy": "", "runtime": "cuda.runtime.", "cublas": "cuda.cublas."}[chain[1]] + chain[2])
    assert len(used) > 20
    assert used - set(blas.COMPUTE.values()) - known == set()


def test_device_attributes_are_those_of_the_table():
    assert tuple(cupy.cuda.Device(0).attributes) == DEVICE_ATTRIBUTES


# memory and arrays


def test_fresh_memory_is_poisoned():
    assert np.isnan(cupy.empty((2, 3), np.float32).get()).all()
    assert (cupy.empty(4, np.int32).get() == -1).all()
    assert (cupy.zeros((2, 3), np.float32).get() == 0).all()
    assert cupy.empty(7, np.uint16).data.ptr % 512 == 0


def test_views_share_memory():
    array = on_device(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    assert (array.shape, array.size, array.nbytes, array.ndim, array.itemsize) == ((2, 3, 4), 24, 96, 3, 4)
    assert array[1].data.ptr == array.data.ptr + 48
    assert array[1, 1:3].get().tolist() == [[16, 17, 18, 19], [20, 21, 22, 23]]
    assert array.reshape(6, -1).shape == (6, 4)
    assert array.view(np.uint16).shape == (2, 3, 8)
    array[0].fill(0)
    assert array.get().sum() == np.arange(12, 24).sum()
    with pytest.raises(ValueError, match="not contiguous"):
        array[:, 1]
    with pytest.raises(TypeError, match="indices"):
        array[np.arange(2)]


@pytest.mark.parametrize(
    "attempt",
    [
        lambda x: x + x,
        lambda x: 2 * x,
        lambda x: np.float32(2) * x,
        lambda x: np.zeros(3, np.float32) + x,
        lambda x: np.exp(x),
        lambda x: np.asarray(x),
        lambda x: x == x,
        lambda x: bool(x),
        lambda x: float(x[0]),
        lambda x: x.__setitem__(0, 1),
        lambda x: x.__iadd__(1),
    ],
)
def test_no_arithmetic(attempt):
    with pytest.raises(TypeError):
        attempt(cupy.zeros(3, np.float32))


def test_set_and_get_require_shape_and_dtype():
    array = cupy.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match="float64"):
        array.set(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="host"):
        array.set(np.zeros(6, np.float32))
    with pytest.raises(TypeError, match="ndarray"):
        array.set([0.0])
    with pytest.raises(ValueError, match="host"):
        array.get(out=np.zeros((3, 2), np.float32))
    out = np.ones((2, 3), np.float32)
    assert array.get(out=out) is out
    assert out.sum() == 0
    with pytest.raises(ValueError, match="only 0"):
        array.fill(1)


def test_pool_counts(monkeypatch):
    gc.collect()
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.used_bytes()
    array = cupy.empty(1000, np.float32)
    assert pool.used_bytes() - before == 4096
    del array
    gc.collect()
    assert pool.used_bytes() == before
    assert pool.total_bytes() == before + 4096
    pool.free_all_blocks()
    assert pool.total_bytes() == before
    monkeypatch.setenv("LLMC_EMULATOR_MEMORY", str(before + 8192))
    free, total = cupy.cuda.Device(0).mem_info
    assert (free, total) == (8192, before + 8192)
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError, match=r"8,704 bytes"):
        cupy.empty(8193, np.uint8)
    pool.set_limit(before + 512)
    with pytest.raises(MemoryError):
        cupy.empty(1000, np.uint8)
    pool.set_limit()


# copies and streams


def test_copy_from_pinned_memory_is_as_late_as_it_may_be():
    host, device = pinned(4), cupy.empty(4, np.float32)
    host[:] = 1
    device.set(host)
    host[:] = 2  # too early
    assert (device.get() == 2).all()


def test_copy_from_other_memory_reads_at_once():
    host, device = np.ones(4, np.float32), cupy.empty(4, np.float32)
    device.set(host)
    host[:] = 2
    assert (device.get() == 1).all()


def test_copy_to_pinned_memory_arrives_with_the_synchronization():
    host, device = pinned(4), cupy.zeros(4, np.float32)
    stream = cupy.cuda.Stream()
    runtime.memcpyAsync(host.ctypes.data, device.data.ptr, 16, runtime.memcpyDeviceToHost, stream.ptr)
    assert np.isnan(host).all()
    stream.synchronize()
    assert (host == 0).all()


def test_streams_wait_only_for_what_they_are_told_to(double):
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    x, y = cupy.empty(4, np.float32), cupy.empty(4, np.float32)
    copy = (y.data.ptr, x.data.ptr, 16, runtime.memcpyDeviceToDevice, second.ptr)
    x.set(np.ones(4, np.float32), first)
    double(x, stream=first)
    runtime.memcpyAsync(*copy)
    assert np.isnan(y.get(second)).all()
    x.set(np.ones(4, np.float32), first)
    double(x, stream=first)
    second.wait_event(first.record())
    runtime.memcpyAsync(*copy)
    assert (y.get(second) == 2).all()


def test_null_stream_takes_turns_with_blocking_streams_only(double):
    for non_blocking in (False, True):
        stream = cupy.cuda.Stream(non_blocking=non_blocking)
        x = cupy.zeros(4, np.float32)  # on the null stream
        with stream:
            double(x)
            assert np.isnan(x.get()).all() == non_blocking


def test_used_stream_is_current(double):
    stream = cupy.cuda.Stream(non_blocking=True).use()
    x = cupy.zeros(4, np.float32)
    assert (x.get(stream) == 0).all()
    cupy.cuda.Stream.null.use()


def test_random_moments(monkeypatch, double):
    """With a seed some copies from pinned memory are early, some late."""
    monkeypatch.setenv("LLMC_EMULATOR_SEED", "1")
    monkeypatch.setattr(raw.emulator, "schedule", lambda seed: None)
    host, seen = pinned(1), set()
    for _ in range(40):
        device = cupy.empty(1, np.float32)
        host[:] = 1
        device.set(host)
        host[:] = 2
        seen.add(float(device.get()[0]))
    assert seen == {1.0, 2.0}


def test_events():
    stream = cupy.cuda.Stream(non_blocking=True)
    first, second, untimed = cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.Event(disable_timing=True)
    first.record(stream)
    stream.record(second)
    untimed.record(stream)
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorNotReady"):
        cupy.cuda.get_elapsed_time(first, second)
    assert not second.done
    second.synchronize()
    assert second.done
    assert not untimed.done
    assert cupy.cuda.get_elapsed_time(first, second) >= 0
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorInvalidResourceHandle"):
        cupy.cuda.get_elapsed_time(first, untimed)


def test_graph_replays(double):
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.empty(4, np.float32)
    host = pinned(4)
    with stream:
        stream.begin_capture()
        x.set(host)
        double(x)
        double(x)
        graph = stream.end_capture()
        assert np.isnan(x.get()).all()
        for value in (1, 2):
            host[:] = value
            graph.launch(stream)
            assert (x.get() == 4 * value).all()
        del x
        gc.collect()
        with pytest.raises(runtime.CUDARuntimeError, match="freed"):
            graph.launch()


def test_no_products_while_capturing():
    """What CuPy's own bindings refuse."""
    stream = cupy.cuda.Stream(non_blocking=True)
    handle = cublas.create()
    cublas.setStream(handle, stream.ptr)
    x = cupy.zeros((2, 2), np.float32)
    one, at = np.ones(1, np.float32), x.data.ptr
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        with pytest.raises(NotImplementedError, match="during stream capture"):
            cublas.gemmEx(handle, 0, 0, 2, 2, 2, one.ctypes.data, at, 0, 2, at, 0, 2, one.ctypes.data, at, 0, 2, 68, -1)
        stream.end_capture()
    cublas.destroy(handle)


def test_nothing_waits_while_capturing():
    stream = cupy.cuda.Stream()
    x = cupy.zeros(4, np.float32)
    host = np.zeros(4, np.float32)
    with stream:
        stream.begin_capture()
        for attempt in (stream.synchronize, x.get, cupy.cuda.Device().synchronize, lambda: x.set(host)):
            with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorStreamCaptureUnsupported"):
                attempt()
        with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorStreamCaptureImplicit"):
            runtime.memsetAsync(x.data.ptr, 0, 16, 0)
        stream.end_capture()
    with pytest.raises(RuntimeError, match="legacy"):
        cupy.cuda.Stream.null.begin_capture()


def test_addresses_are_checked():
    device, host = cupy.zeros(4, np.float32), np.zeros(5, np.float32)
    kind = runtime.memcpyHostToDevice
    with pytest.raises(runtime.CUDARuntimeError, match="no allocation"):
        runtime.memcpyAsync(device.data.ptr, host.ctypes.data, 20, kind, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="said to be the host's"):
        runtime.memcpyAsync(device.data.ptr, device.data.ptr, 16, kind, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="no allocation"):
        runtime.memsetAsync(host.ctypes.data, 0, 4, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="overlap"):
        runtime.memcpyAsync(device.data.ptr, device.data.ptr + 4, 8, runtime.memcpyDeviceToDevice, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="no stream"):
        runtime.memsetAsync(device.data.ptr, 0, 4, 12345)


# kernels


def arguments(x):
    return [x, np.int32(1), np.int64(0), np.float32(0)]


@pytest.mark.parametrize(
    "number, value, said",
    [
        (1, 1, "an int64"),
        (3, 1.0, "a float64"),
        (1, True, "one byte"),
        (1, np.int64(1), "numpy.int32"),
        (2, np.int32(1), "numpy.int64"),
        (3, np.float64(1), "numpy.float32"),
        (0, None, "numpy.uint64"),
        (0, np.zeros(1, np.float32), "no array of a device"),
    ],
)
def test_argument_types_are_exact(kernel, number, value, said):
    args = arguments(cupy.zeros(1, np.float32))
    args[number] = value
    with pytest.raises(TypeError, match=said):
        kernel((1,), (1,), tuple(args))


def test_null_pointer(monkeypatch, kernel):
    seen = []
    monkeypatch.setattr(Compiled, "launch", lambda self, name, grid, block, args, shared: seen.append((args, grid)))
    kernel((2,), (1,), tuple(arguments(np.uint64(0))))
    cupy.cuda.Device().synchronize()
    assert seen[0][0][0] == 0
    assert seen[0][1] == (2, 1, 1)


@pytest.mark.parametrize(
    "grid, block, error",
    [
        ((0,), (1,), ValueError),
        ((1,), (1025,), cupy.cuda.driver.CUDADriverError),
        ((1,), (32, 64), cupy.cuda.driver.CUDADriverError),
        ((1,), (1, 1, 65), cupy.cuda.driver.CUDADriverError),
        ((1, 65536), (1,), cupy.cuda.driver.CUDADriverError),
        ((1.0,), (1,), TypeError),
        (1, (1,), TypeError),
    ],
)
def test_dimensions(kernel, grid, block, error):
    with pytest.raises(error):
        kernel(grid, block, tuple(arguments(cupy.zeros(1, np.float32))))


def test_large_shared_memory_is_opted_in(monkeypatch, kernel):
    args = tuple(arguments(cupy.zeros(1, np.float32)))
    kernel((1,), (1,), args, shared_mem=48 << 10)
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="max_dynamic"):
        kernel((1,), (1,), args, shared_mem=(48 << 10) + 1)
    kernel.max_dynamic_shared_size_bytes = 64 << 10
    kernel((1,), (1,), args, shared_mem=64 << 10)
    monkeypatch.setenv("LLMC_EMULATOR_CAPABILITY", "86")
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="101376"):
        kernel.max_dynamic_shared_size_bytes = 100 << 10


def test_unknown_function(kernel):
    with pytest.raises(cupy.cuda.driver.CUDADriverError, match="NOT_FOUND"):
        cupy.RawModule(code="").get_function("triple")


def test_error_names_who_asked(monkeypatch, double):
    def fail(*args, **options):
        raise RuntimeError("out of bounds")

    monkeypatch.setattr(Compiled, "launch", fail)
    double(cupy.zeros(1, np.float32))
    with pytest.raises(RuntimeError, match="out of bounds") as error:
        cupy.cuda.Device().synchronize()
    assert "test_cuda_stand_in.py" in error.value.__notes__[0]


@pytest.mark.skipif(shutil.which("g++") is None and "CI" not in os.environ, reason="the emulator needs g++")
def test_kernel_on_the_emulator():
    code = """
        extern "C" __global__ void scale(float* x, int n, float by) {
            if (threadIdx.x < n) {
                x[threadIdx.x] *= by;
            }
        }
    """
    kernel = cupy.RawModule(code=code, options=("-std=c++17",)).get_function("scale")
    x = on_device(np.arange(5, dtype=np.float32))
    kernel((1,), (32,), (x, np.int32(4), np.float32(3)))
    assert x.get().tolist() == [0, 3, 6, 9, 4]


# cuBLAS


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


# machines


def test_several_devices(monkeypatch, double):
    monkeypatch.setenv("LLMC_EMULATOR_DEVICES", "2")
    assert runtime.getDeviceCount() == 2
    x = cupy.zeros(4, np.float32)
    with cupy.cuda.Device(1) as device:
        assert cupy.cuda.Device().id == device.id == 1
        with pytest.raises(runtime.CUDARuntimeError, match="device 0"):
            double(x)
        stream = cupy.cuda.Stream()
        y = cupy.zeros(4, np.float32)
        double(y, stream=stream)
        assert (y.get(stream) == 0).all()
    with pytest.raises(RuntimeError, match="device 1"), stream:
        pass
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorInvalidDevice"):
        cupy.cuda.Device(2).use()


def test_capability(monkeypatch):
    assert cupy.cuda.Device(0).compute_capability == "90"
    monkeypatch.setenv("LLMC_EMULATOR_CAPABILITY", "75")
    assert cupy.cuda.Device(0).compute_capability == "75"
    assert cupy.cuda.Device(0).attributes["MaxSharedMemoryPerBlockOptin"] == 64 << 10
    assert b"75" in runtime.getDeviceProperties(0)["name"]


@pytest.mark.parametrize(
    "capability, registers, threads, shared, blocks",
    [
        (80, 32, 256, 0, 8),  # threads
        (80, 64, 256, 0, 4),  # registers
        (80, 33, 256, 0, 6),  # 40 registers are given out
        (90, 255, 256, 0, 1),
        (90, 65, 1024, 0, 0),
        (80, 16, 32, 0, 32),  # blocks
        (75, 16, 32, 0, 16),
        (80, 32, 128, 40 << 10, 4),  # 164 KB by 41
        (86, 32, 128, 99 << 10, 1),
        (86, 32, 128, 100 << 10, 0),
        (75, 32, 128, 32 << 10, 2),
    ],
)
def test_blocks_at_once(capability, registers, threads, shared, blocks):
    assert blocks_at_once(capability, registers, threads, shared) == blocks


@pytest.mark.parametrize(
    "variable, value, said",
    [
        ("DRIVER", "0", "cudaErrorInsufficientDriver"),
        ("DRIVER", "11040", "cudaErrorInsufficientDriver"),
        ("DEVICES", "0", "cudaErrorNoDevice"),
    ],
)
def test_without_driver_or_device_everything_says_so(monkeypatch, variable, value, said):
    monkeypatch.setenv(f"LLMC_EMULATOR_{variable}", value)
    for attempt in (
        runtime.getDeviceCount,
        lambda: runtime.getDeviceProperties(0),
        lambda: cupy.cuda.Device(0).compute_capability,
        lambda: cupy.cuda.Device(0).mem_info,
        lambda: cupy.cuda.Device(0).use(),
        lambda: cupy.empty(1),
        lambda: cupy.cuda.Stream(),
        lambda: cupy.cuda.Event(),
        lambda: cupy.cuda.alloc_pinned_memory(1),
        lambda: cupy.RawModule(code="").get_function("f"),
        cublas.create,
    ):
        with pytest.raises(runtime.CUDARuntimeError, match=said):
            attempt()
    assert runtime.driverGetVersion() == (int(value) if variable == "DRIVER" else 13000)
    assert cupy.cuda.Device(0).id == 0  # as in CuPy, a name only


def test_a_subprocess_needs_only_the_path():
    path = str(Path(stand_in.__file__).parent)
    code = "import cupy, numpy; print(cupy.__version__, cupy.zeros(3, numpy.int32).get().tolist())"
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert answer.stdout == f"{cupy.__version__} [0, 0, 0]\n"
