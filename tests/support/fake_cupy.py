"""The loaded fake CuPy and helpers that put data on its devices."""

import ctypes

import numpy as np
from support.cuda_emulator import cupy_loader

cupy = cupy_loader.load()
runtime, cublas = cupy.cuda.runtime, cupy.cuda.cublas
raw = cupy._raw


class Compiled:
    """A replacement for a compiled program with one kernel, ``double`` (float* x, int n, long long, float)."""

    names = ("double",)

    def __init__(self, source, options, check):
        self.options, self.check = options, check

    def signature(self, name):
        return ["P", "i4", "i8", "f4"]

    def launch(self, name, grid, block, args, shared):
        values = np.frombuffer((ctypes.c_float * int(args[1])).from_address(args[0]), np.float32)
        np.multiply(values, 2, out=values)


def doubling_kernel(monkeypatch):
    """Return the kernel ``double``, which multiplies the elements of x by 2 and needs no compiler."""
    monkeypatch.setattr(raw.emulator, "Program", Compiled)
    monkeypatch.setattr(raw.memory, "register_with_emulator", lambda: None)
    return cupy.RawModule(code="", options=("-std=c++17",)).get_function("double")


def on_device(values):
    values = np.asarray(values)
    array = cupy.empty(values.shape, values.dtype)
    array.set(values)
    return array


def pinned(count, dtype=np.float32):
    memory = cupy.cuda.alloc_pinned_memory(count * np.dtype(dtype).itemsize)
    return np.frombuffer(memory, dtype, count)
