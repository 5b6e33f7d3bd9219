"""The emulator's own kernels, which its tests compile and launch."""

import contextlib
from pathlib import Path

import numpy as np
from support.cuda_emulator import emulator

FOLDER = Path(__file__).parent / "cuda_emulator"
CORRECT = (FOLDER / "correct.cu").read_text()
FAULTY = (FOLDER / "faulty.cu").read_text()
ORDERS = (None, 1, 2)
"""Seeds of ``emulator.schedule``."""


def compiled(source, check=True):
    return emulator.Program(source, ("-DSCALE=2.5f", "-arch=sm_90"), check)


@contextlib.contextmanager
def memory():
    """Yield register(array), which registers an array as device memory and returns it."""
    with contextlib.ExitStack() as stack:
        arrays = []

        def register(array):
            arrays.append(array)  # its memory must not be reused before it is unregistered
            emulator.register(array.ctypes.data, array.nbytes)
            stack.callback(emulator.unregister, array.ctypes.data)
            return array

        yield register


@contextlib.contextmanager
def ordered(seed):
    """Set the order of blocks and threads by a seed."""
    emulator.schedule(seed)
    yield
    emulator.schedule(None)


def launch(program, name, grid, block, *args, shared=0):
    args = [arg.ctypes.data if isinstance(arg, np.ndarray) else arg for arg in args]
    args = [np.int32(arg) if kind == "i4" else arg for kind, arg in zip(program.signature(name), args, strict=True)]
    program.launch(name, grid, block, args, shared)


def random(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)
