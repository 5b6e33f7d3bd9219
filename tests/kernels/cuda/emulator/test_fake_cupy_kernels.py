"""Kernel launches on the fake CuPy: invalid arguments, dimensions and shared memory sizes are rejected."""

from pathlib import Path

import numpy as np
import pytest
from support.fake_cupy import Compiled, cupy, doubling_kernel, on_device

pytestmark = pytest.mark.usefixtures("clear_streams")


@pytest.fixture
def kernel(monkeypatch):
    return doubling_kernel(monkeypatch)


def arguments(x):
    return [x, np.int32(1), np.int64(0), np.float32(0)]


@pytest.mark.parametrize(
    "number, value, message",
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
def test_argument_types_are_exact(kernel, number, value, message):
    args = arguments(cupy.zeros(1, np.float32))
    args[number] = value
    with pytest.raises(TypeError, match=message):
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
def test_invalid_grid_or_block(kernel, grid, block, error):
    with pytest.raises(error):
        kernel(grid, block, tuple(arguments(cupy.zeros(1, np.float32))))


def test_large_shared_memory_requires_opt_in(monkeypatch, kernel):
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


def test_error_names_the_calling_line(monkeypatch, kernel):
    def fail(*args, **options):
        raise RuntimeError("out of bounds")

    monkeypatch.setattr(Compiled, "launch", fail)
    kernel((1,), (1,), tuple(arguments(cupy.zeros(1, np.float32))))
    with pytest.raises(RuntimeError, match="out of bounds") as error:
        cupy.cuda.Device().synchronize()
    assert Path(__file__).name in error.value.__notes__[0]


@pytest.mark.usefixtures("requires_gxx")
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
