"""The fake CuPy: its interface, memory and simulated devices."""

import ast
import gc
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.cuda_emulator import cupy_loader
from support.cuda_emulator.architectures import blocks_at_once
from support.cupy_calls import ATTRIBUTES, CALLS, CONSTANTS, DEVICE_ATTRIBUTES, ERRORS, parameters, resolve
from support.fake_cupy import cublas, cupy, on_device, raw, runtime

from llmc_cli.kernels.cuda import blas, device

pytestmark = pytest.mark.usefixtures("clear_streams")


# Interface, as listed in support/cupy_calls.py


def resolve_name(name):
    """Resolve a name of support/cupy_calls.py, in which RawKernel is not an attribute of cupy."""
    return raw.RawKernel if name == "RawKernel" else resolve(cupy, name)


@pytest.mark.parametrize("name", CALLS)
def test_call_signature(name):
    first, _, rest = name.partition(".")
    called = resolve(resolve_name(first), rest) if rest else resolve_name(first)
    actual = [each for each in inspect.signature(called).parameters.values() if each.name != "self"]
    by_position, by_name = parameters(CALLS[name])
    names = [("*" if each.kind is each.VAR_POSITIONAL else "") + each.name for each in actual]
    assert names == by_position + by_name
    assert all(each.kind is each.KEYWORD_ONLY for each in actual if each.name in by_name)


@pytest.mark.parametrize("name", (*ATTRIBUTES, *ERRORS))
def test_attribute_exists(name):
    first, _, rest = name.partition(".")
    assert resolve(resolve_name(first), rest) is not None


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_has_its_value(name):
    assert resolve(cupy, name) == CONSTANTS[name]


def test_backend_uses_no_other_calls():
    """support/cupy_calls.py lists every attribute of cupy, runtime and cublas that the backend uses."""
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


def test_device_attributes():
    assert tuple(cupy.cuda.Device(0).attributes) == DEVICE_ATTRIBUTES


# Memory and arrays


def test_fresh_memory_is_nan():
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
def test_array_arithmetic_is_not_supported(attempt):
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


def test_memory_pool_counters(monkeypatch):
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


# Devices


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
        (80, 33, 256, 0, 6),  # rounded up to 40 registers per thread
        (90, 255, 256, 0, 1),
        (90, 65, 1024, 0, 0),
        (80, 16, 32, 0, 32),  # blocks
        (75, 16, 32, 0, 16),
        (80, 32, 128, 40 << 10, 4),  # 164 KB / 41 KB
        (86, 32, 128, 99 << 10, 1),
        (86, 32, 128, 100 << 10, 0),
        (75, 32, 128, 32 << 10, 2),
    ],
)
def test_blocks_at_once(capability, registers, threads, shared, blocks):
    assert blocks_at_once(capability, registers, threads, shared) == blocks


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("DRIVER", "0", "cudaErrorInsufficientDriver"),
        ("DRIVER", "11040", "cudaErrorInsufficientDriver"),
        ("DEVICES", "0", "cudaErrorNoDevice"),
    ],
)
def test_missing_driver_or_device_is_reported(monkeypatch, variable, value, message):
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
        with pytest.raises(runtime.CUDARuntimeError, match=message):
            attempt()
    assert runtime.driverGetVersion() == (int(value) if variable == "DRIVER" else 13000)
    assert cupy.cuda.Device(0).id == 0  # as in CuPy, creating a Device does not access it


def test_import_in_a_subprocess():
    path = str(Path(cupy_loader.__file__).parent)
    code = "import cupy, numpy; print(cupy.__version__, cupy.zeros(3, numpy.int32).get().tolist())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert result.stdout == f"{cupy.__version__} [0, 0, 0]\n"
