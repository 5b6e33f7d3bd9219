"""Every call of CuPy that llmc makes, against the real wheel; no device and no driver are needed.

CuPy is compiled from Cython, whose functions tell their signatures in the first line of their docstrings. Its binding
of cuBLAS is linked to libcublas, hundreds of megabytes that this needs nothing of: an empty library of that name is
enough to load it.
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
    """The real CuPy with its cuBLAS, while these tests run: others may have put the fake CuPy in its place."""
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
    """CuPy's binding, linked to an empty library for CUDA ``version``."""
    name = f"libcublas.so.{version}"
    (folder / "empty.cpp").write_text("")
    (folder / "versions").write_text(f"{name} {{ *; }};")
    command = ["g++", "-shared", "-nostdlib", f"-Wl,-soname,{name}", "-Wl,--version-script=versions"]
    subprocess.run([*command, "empty.cpp", "-o", name], cwd=folder, check=True)
    ctypes.CDLL(str(folder / name))
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)  # functions that are not there are missed only when they are called
    try:
        return importlib.import_module("cupy_backends.cuda.libs.cublas")
    finally:
        sys.setdlopenflags(flags)


def split(text):
    """The parameters between brackets, at the commas that separate them."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part.strip() for part in (*parts, text[start:]) if part.strip()]


def signature(function):
    """Names of parameters in order, without self; ``*`` stands where what follows is passed by name only."""
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


@pytest.mark.parametrize("keyword, answer", [("stream", "its pointer is read"), ("bogus", "unexpected keyword")])
def test_kernel_accepts_launch_keywords(cupy, keyword, answer):
    """RawKernel hands ``**kwargs`` to Function, which has no signature to read: it takes ``stream``, and reads ``ptr``
    of it, before it would touch a device."""

    class Pointer:
        @property
        def ptr(self):
            raise TypeError("its pointer is read")

    function = cupy.cuda.Function.__new__(cupy.cuda.Function)
    with pytest.raises(TypeError, match=answer):
        function((1,), (1,), (), shared_mem=0, **{keyword: Pointer()})


def test_bindings_link_to_the_library_called_directly(cupy):
    """By its name on Linux; of the functions CuPy calls all but the one for the workspace itself."""
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
    memoryview_of = cupy.cuda.PinnedMemoryPointer(type("Memory", (), {"ptr": 0, "size": 0})(), 0)
    assert memoryview_of.ptr == 0


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
        pytest.skip("there is a driver here")
    assert cupy.cuda.runtime.driverGetVersion() == 0
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInsufficientDriver") as error:
        cupy.cuda.runtime.getDeviceCount()
    assert error.value.status == 35


def test_compiler_options_match_cupy(cupy, monkeypatch, tmp_path):
    """test_cuda_compile.py compiles with what ends up at NVRTC here."""
    compiler = importlib.import_module("cupy.cuda.compiler")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    seen = []

    class Stop(Exception):
        pass

    class Program:
        def __init__(self, *args, **kwargs):
            pass

        def compile(self, options, log_stream=None):
            seen.append(tuple(each for each in options if not each.startswith("-I")))  # nothing is included
            raise Stop

    monkeypatch.setattr(compiler, "_NVRTCProgram", Program)
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    monkeypatch.setattr(compiler, "_get_nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "_preprocess", lambda *args: "")
    monkeypatch.setattr(compiler.function, "Module", lambda: None)
    with pytest.raises(Stop):
        compiler._compile_module_with_cache("", ("-std=c++17",), arch="90")
    assert seen == [("-std=c++17", *ADDED_BY_CUPY[:1], "-arch=sm_90", *ADDED_BY_CUPY[1:])]
