"""Compile the CUDA programs as CuPy does, without a device, and parse each kernel's resources from the compiler's log.

Needs a wheel with NVRTC: nvidia-cuda-nvrtc (13.x), nvidia-cuda-nvrtc-cu12, or both.
"""

import ctypes
import functools
import importlib.util
import itertools
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from support.cuda_emulator.architectures import ARCHITECTURES

from llmc_cli.kernels.cuda import source as source_module
from llmc_cli.kernels.cuda.device import OPTIONS, TENSOR_CORES
from llmc_cli.kernels.cuda.source import source

ADDED_BY_CUPY = ("-ftz=true", "--device-as-default-execution-space")
VERBOSE = "--ptxas-options=-v"
PROGRAMS = tuple(sorted(path.stem for path in Path(source_module.__file__).parent.glob("*.cu")))
LIBRARIES = {12: "cuda_nvrtc/lib/libnvrtc.so.12", 13: "cu13/lib/libnvrtc.so.13"}
PROCESSES = 2

ENTRY = re.compile(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry function|\Z)", re.DOTALL)
COMPLAINT = re.compile(r"^.*\b(?:warning|error)\b.*$", re.MULTILINE)


class Variant(NamedTuple):
    """One compilation."""

    program: str
    bf16: bool
    capability: int


class Kernel(NamedTuple):
    """Resources of a compiled kernel: registers and stack bytes per thread, spilled bytes, shared memory bytes."""

    registers: int
    stack: int
    spilled: int
    shared: int


class Compiled(NamedTuple):
    kernels: dict[str, Kernel]
    complaints: str  # errors and warnings


def variants():
    """Yield all variants in use, the slowest to compile first: bf16 only for architectures with bf16 tensor cores, and
    attention_mma only in bf16."""
    for program, capability, bf16 in itertools.product(PROGRAMS, ARCHITECTURES, (False, True)):
        if capability >= TENSOR_CORES if bf16 else program != "attention_mma":
            yield Variant(program, bf16, capability)


def library(version):
    """Return the path of NVRTC for CUDA ``version``, or None if its wheel is not installed."""
    found = importlib.util.find_spec("nvidia")
    folders = list(found.submodule_search_locations or ()) if found else []
    paths = [Path(folder) / LIBRARIES[version] for folder in folders]
    return next((path for path in paths if path.exists()), None)


@functools.cache
def _load(version):
    nvrtc = ctypes.CDLL(str(library(version)))
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return nvrtc


def full_version(version):
    """Return the version of NVRTC, such as "13.0"."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _load(version).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_variant(version, variant):
    nvrtc, handle = _load(version), ctypes.c_void_p()
    real = ("-DREAL_BF16",) if variant.bf16 else ()
    options = [*OPTIONS, *real, *ADDED_BY_CUPY, f"-arch=sm_{variant.capability}", VERBOSE]
    text = source(variant.program).encode()
    made = nvrtc.nvrtcCreateProgram(ctypes.byref(handle), text, f"{variant.program}.cu".encode(), 0, None, None)
    if made:
        raise RuntimeError(nvrtc.nvrtcGetErrorString(made).decode())
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(handle, len(options), array)
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(handle, log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(handle))
    return _read(log.value.decode(), nvrtc.nvrtcGetErrorString(status).decode() if status else "")


def _read(log, error):
    kernels = {}
    for name, facts in ENTRY.findall(log):
        kernels[name] = Kernel(
            registers=_number(r"Used (\d+) registers", facts),
            stack=_number(r"(\d+) bytes stack frame", facts),
            spilled=_number(r"(\d+) bytes spill stores", facts) + _number(r"(\d+) bytes spill loads", facts),
            shared=_number(r"(\d+) bytes smem", facts),
        )
    return Compiled(kernels, "\n".join([error, *COMPLAINT.findall(log)]).strip())


def _number(pattern, text):
    """Return the largest number that matches, or 0."""
    return max((int(number) for number in re.findall(pattern, text)), default=0)


def compile_all(version):
    """Compile every variant with NVRTC for CUDA ``version``, in two processes."""
    wanted = list(variants())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        return dict(zip(wanted, pool.map(functools.partial(compile_variant, version), wanted), strict=True))
