"""The functions of CuPy that llmc calls have the expected signatures in the real package. No GPU or driver is needed.

Functions compiled by Cython give their signatures in the first line of their docstrings. CuPy's cuBLAS binding links to
libcublas, which has hundreds of megabytes; an empty library of the same name is enough to load the binding.
"""

import ctypes
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cuda_compiler import ADDED_BY_CUPY
from support.cuda_emulator import cupy_loader
from support.cupy_calls import ATTRIBUTES, CALLS, CONSTANTS, DEVICE_ATTRIBUTES, ERRORS, parameters, resolve

from llmc_cli.kernels.cuda.blas import INTERFACE

pytestmark = pytest.mark.cupy


@pytest.fixture(scope="module")
def cupy(tmp_path_factory):
    """Import the real CuPy and its cuBLAS binding for these tests, even if another test has imported the fake CuPy."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "path", [folder for folder in sys.path if folder != str(cupy_loader.FOLDER)])
        module = importlib.import_module("cupy")
        assert Path(module.__file__).parent.parent != cupy_loader.FOLDER
        module.cuda.cublas = cublas(tmp_path_factory.mktemp("cublas"), module.cuda.runtime.runtimeGetVersion() // 1000)
        yield module
        for name in [name for name in sys.modules if name.partition(".")[0] == "cupy"]:
            del sys.modules[name]


def cublas(folder, version):
    """Load CuPy's cuBLAS binding with an empty library for CUDA ``version``."""
    name = f"libcublas.so.{version}"
    (folder / "empty.cpp").write_text("")
    (folder / "versions").write_text(f"{name} {{ *; }};")
    command = ["g++", "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-Wl,--version-script=versions"]
    subprocess.run([*command, "empty.cpp", "-o", name], cwd=folder, check=True)
    ctypes.CDLL(str(folder / name))
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # resolve functions only when they are called
    try:
        return importlib.import_module("cupy_backends.cuda.libs.cublas")
    finally:
        sys.setdlopenflags(flags)


def split(text):
    """Split parameters at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def signature(function):
    """Return the parameter names in order, without self; ``*`` precedes keyword-only parameters."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        pass
    else:
        if all(each.name not in ("args", "kwargs") for each in found):
            return [each.name for each in found if each.name != "self"]
    line = (function.__doc__ or "").lstrip().splitlines()[0]
    bracketed = re.match(r"[\w.]+\((.*)\)", line)
    assert bracketed, f"{function}: no signature in {line!r}"
    names = [re.split(r"\s*=", part)[0].split()[-1] for part in split(bracketed[1])]
    return [name for name in names if name != "self"]


@pytest.mark.parametrize("name", CALLS)
def test_call_exists_with_its_parameters(cupy, name):
    by_position, by_name = parameters(CALLS[name])
    found = signature(resolve(cupy, name))
    before_star = found[: found.index("*")] if "*" in found else found
    assert before_star[: len(by_position)] == by_position
    if "**kwargs" not in found:
        assert set(by_name) <= set(found)


@pytest.mark.parametrize("keyword, message", [("stream", "pointer was read"), ("bogus", "unexpected keyword")])
def test_kernel_accepts_launch_keywords(cupy, keyword, message):
    """RawKernel passes ``**kwargs`` to Function, whose signature is not available. A call shows that it accepts
    ``stream``: it reads ``stream.ptr`` before it accesses a device."""

    class Pointer:
        @property
        def ptr(self):
            raise TypeError("pointer was read")

    function = cupy.cuda.Function.__new__(cupy.cuda.Function)
    with pytest.raises(TypeError, match=message):
        function((1,), (1,), (), shared_mem=0, **{keyword: Pointer()})


def test_bindings_link_to_the_library_called_directly(cupy):
    """CuPy uses the same library name and the same functions, except the one that sets the workspace."""
    binding = Path(cupy.cuda.cublas.__file__).read_bytes()
    assert f"libcublas.so.{cupy.cuda.runtime.runtimeGetVersion() // 1000}".encode() in binding
    for name in sorted(INTERFACE.keys() - {"cublasSetWorkspace_v2"}):
        assert name.encode() in binding


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attribute_exists(cupy, name):
    assert resolve(cupy, name) is not None


def test_arrays_and_pinned_memory_have_pointers(cupy):
    assert hasattr(cupy.ndarray, "data")
    assert hasattr(cupy.cuda.MemoryPointer, "ptr")
    assert hasattr(cupy.cuda.PinnedMemoryPointer, "ptr")
    pointer = cupy.cuda.PinnedMemoryPointer(type("Memory", (), {"ptr": 0, "size": 0})(), 0)
    assert pointer.ptr == 0


@pytest.mark.parametrize("name", ERRORS)
def test_error_class(cupy, name):
    assert issubclass(resolve(cupy, name), ERRORS[name])


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_has_its_value(cupy, name):
    assert resolve(cupy, name) == CONSTANTS[name]


@pytest.mark.parametrize("name", DEVICE_ATTRIBUTES)
def test_device_attribute_exists(cupy, name):
    assert hasattr(cupy.cuda.runtime, f"cudaDevAttr{name}")


def test_missing_driver_is_reported(cupy):
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("a driver is installed")
    assert cupy.cuda.runtime.driverGetVersion() == 0
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInsufficientDriver") as error:
        cupy.cuda.runtime.getDeviceCount()
    assert error.value.status == 35


def test_compiler_options_match_cupy(cupy, monkeypatch, tmp_path):
    """The compilation tests pass the same options to NVRTC as CuPy does."""
    compiler = importlib.import_module("cupy.cuda.compiler")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    seen = []

    class Stop(Exception):
        pass

    class Program:
        def __init__(self, *args, **kwargs):
            pass

        def compile(self, options, log_stream=None):
            seen.append(tuple(each for each in options if not each.startswith("-I")))  # kernels include nothing
            raise Stop

    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    monkeypatch.setattr(compiler, "_get_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "_preprocess", lambda *args: "")
    monkeypatch.setattr(compiler.function, "Module", lambda: None)
    with pytest.raises(Stop):
        compiler._compile_module_with_cache("", ("-std=c++17",), arch="90")
    assert seen == [("-std=c++17", *ADDED_BY_CUPY[:1], "-arch=sm_90", *ADDED_BY_CUPY[1:])]
