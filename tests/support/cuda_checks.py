"""Shared by the tests of CUDA kernels: a device backed by the emulator, and checks that run a kernel under several
orders of blocks and threads, or with a planted fault."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from support.cuda_emulator import emulator

from llmc_cli.formats import bfloat16
from llmc_cli.kernels.cuda.source import source
from llmc_cli.kernels.operations import OPERATIONS

SCHEDULES = (None, 1, 2)
BF16 = 2.0**-8  # bound on relative errors of bf16 outputs: half a unit of the 8-bit mantissa, doubled for arithmetic
precisions = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


class Memory(np.ndarray):
    """A NumPy array with the ``data.ptr`` attribute of a device array."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class EmulatedDevice:
    """A replacement for ``Device`` that runs launches on the emulator with all its checks, on NumPy arrays.

    ``shift`` is the number of elements by which arrays are misaligned for 16-byte accesses. ``change`` transforms a
    program's source before it is compiled.
    """

    def __init__(self, bf16, shift=0, change=lambda text: text):
        self.real = np.uint16 if bf16 else np.float32
        self.shift, self.change = shift, change
        self.programs, self.arrays = {}, []

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for array in self.arrays:
            emulator.unregister(array.ctypes.data)

    def compiled(self, text):
        return emulator.Program(text, ("-DREAL_BF16",) if self.real == np.uint16 else (), check=True)

    def program(self, file, kernel=None):
        if file not in self.programs:
            self.programs[file] = self.compiled(self.change(source(file)))
        return self.programs[file]

    def launch(self, file, kernel, grid, block, args, shared=0):
        addresses = [0 if a is None else a.ctypes.data if isinstance(a, np.ndarray) else a for a in args]
        self.program(file, kernel).launch(kernel, grid, block, tuple(addresses), shared)

    def put(self, values, dtype, shift=None):
        """Return device memory with these values, rounded to bf16 if ``dtype`` is uint16. ``shift`` is the misalignment
        of this array in bytes."""
        values = np.asarray(values)
        itemsize = np.dtype(dtype).itemsize
        raw = np.empty(values.size * itemsize + 128, np.uint8)
        start = -raw.ctypes.data % 64 + (self.shift * itemsize if shift is None else shift)
        array = raw[start : start + values.size * itemsize].view(dtype).reshape(values.shape)
        if array.dtype == np.uint16:
            bfloat16.from_float32(np.ascontiguousarray(values, np.float32), array)
        else:
            array[...] = values
        emulator.register(array.ctypes.data, array.nbytes)
        self.arrays.append(array)
        return array.view(Memory)

    def reals(self, values):
        return self.put(values, self.real)

    def floats(self, values):
        return self.put(values, np.float32)

    def ints(self, values):
        return self.put(values, np.int32)

    def unwritten(self, *shape, dtype=np.float32):
        return self.put(np.full(shape, np.nan), dtype)


class Result(NamedTuple):
    name: str
    found: np.ndarray  # on the device
    expected: np.ndarray
    bound: float  # on the error, relative to the largest number expected


class Fault(NamedTuple):
    """A bug to plant in a kernel by replacing ``old``, which occurs once in the source, and a case that detects it."""

    name: str
    file: str
    old: str
    new: str
    case: tuple
    bf16: bool = False
    shift: int = 0


def as_float(array):
    if array.dtype != np.uint16:
        return np.array(array, np.float64)
    wide = np.empty(array.shape, np.float32)
    bfloat16.to_float32(array.view(np.ndarray), wide)
    return wide.astype(np.float64)


def bounds(operation, *outputs):
    return [OPERATIONS[operation].bounds[name] for name in outputs]


def rows_of(letters, *rows):
    """Return one dict of sizes per row, keyed by letter."""
    return [dict(zip(letters.split(), row, strict=True)) for row in rows]


def case_id(case):
    """Return the test id of a case, which is a check and its sizes."""
    check, sizes = case
    return check.__name__.removeprefix("check_") + "-" + " ".join(f"{k}={v}" for k, v in sizes.items() if k != "cuts")


def run(check, device, sizes):
    """Run ``check`` under all schedules. Raises AssertionError or EmulatorError if a kernel is wrong.

    A check creates inputs, launches kernels and returns their outputs with those of the reference for the same inputs.
    """
    bits = set()
    for seed in SCHEDULES:
        emulator.schedule(seed)
        results = check(device, np.random.default_rng(0), **sizes)
        for name, found, expected, bound in results:
            limit = max(bound, BF16) if found.dtype == np.uint16 and bound > 0.0 else bound
            error = np.abs(as_float(found) - expected).max()
            largest = np.abs(expected).max()
            assert error <= limit * largest, f"{name}: error {error:.3g}, largest {largest:.3g}, bound {limit:.3g}"
        bits.add(b"".join(found.tobytes() for _, found, _, _ in results))
    assert len(bits) == 1, "the result depends on the order of blocks and threads"


def run_case(case, bf16, shift=0):
    """Run a case under all schedules."""
    check, sizes = case
    with EmulatedDevice(bf16, shift) as device:
        run(check, device, sizes)


def check_fault_detected(fault):
    """Assert that the fault's case fails with the fault planted."""
    assert source(fault.file).count(fault.old) == 1
    check, sizes = fault.case
    with EmulatedDevice(fault.bf16, fault.shift, lambda text: text.replace(fault.old, fault.new)) as device:
        device.program(fault.file)  # the faulty source must compile
        with pytest.raises((AssertionError, emulator.EmulatorError)):
            run(check, device, sizes)
