"""What the tests of CUDA kernels share: a device on the emulator, and checks of what is launched on it, under several
orders of blocks and threads, or with a fault planted."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from support.cuda_emulator import emulator

from llmc_cli.formats import bfloat16
from llmc_cli.kernels.cuda.source import source
from llmc_cli.kernels.operations import OPERATIONS

SCHEDULES = (None, 1, 2)
BF16 = 2.0**-8  # the bound on what is stored as bf16: half a unit in the last of its 8 bits, and as much for arithmetic
precisions = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])


class Memory(np.ndarray):
    """A NumPy array with an address as device arrays have it."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


class EmulatedDevice:
    """What launches need of a device, with NumPy arrays for its memory. All of it is checked by the emulator.

    ``shift``: by how many elements arrays miss the alignment that accesses of 16 bytes need. ``change``: what is to be
    made of a program's text before it is compiled.
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
        """Device memory with these values; where ``dtype`` is uint16 they are rounded to bf16. ``shift``: of this array
        alone, in bytes."""
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
    """Something a kernel might do wrong: ``old`` text, which is there once, replaced; and a case that shows it."""

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
    """Sizes by their letters."""
    return [dict(zip(letters.split(), row, strict=True)) for row in rows]


def case_id(case):
    """The name of a case: a check, and the sizes it gets."""
    check, sizes = case
    return check.__name__.removeprefix("check_") + "-" + " ".join(f"{k}={v}" for k, v in sizes.items() if k != "cuts")


def run(check, device, sizes):
    """``check`` under all schedules; AssertionError or EmulatorError where a kernel is wrong.

    A check makes inputs, launches, and gives outputs beside what the reference makes of the inputs as stored.
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
    assert len(bits) == 1, "other bits in another order of blocks and threads"


def run_case(case, bf16, shift=0):
    """The test of a case."""
    check, sizes = case
    with EmulatedDevice(bf16, shift) as device:
        run(check, device, sizes)


def check_fault_detected(fault):
    """The test of a fault: that the check which its case names fails."""
    assert source(fault.file).count(fault.old) == 1
    check, sizes = fault.case
    with EmulatedDevice(fault.bf16, fault.shift, lambda text: text.replace(fault.old, fault.new)) as device:
        device.program(fault.file)  # it compiles: what is noticed is what it does
        with pytest.raises((AssertionError, emulator.EmulatorError)):
            run(check, device, sizes)
