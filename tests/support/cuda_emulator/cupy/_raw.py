"""Modules and kernels, run by the emulator."""

import emulator
import numpy as np
from architectures import KNOWN, SHARED_WITHOUT_OPT_IN, THREADS_PER_BLOCK

from cupy._array import ndarray
from cupy._status import CUDADriverError, CUDARuntimeError, capability, current, require_device, setting
from cupy.cuda import memory
from cupy.cuda import stream as streams

SCALARS = {"i4": np.int32, "i8": np.int64, "f4": np.float32, "f8": np.float64}
LARGEST_GRID = (2**31 - 1, 65535, 65535)
LARGEST_BLOCK = (1024, 1024, 64)

_seed = -1


def _schedule():
    global _seed
    seed = setting("SEED", -1)
    if seed != _seed:
        emulator.schedule(None if seed < 0 else seed)
        _seed = seed


class RawModule:
    """A module, compiled when its first function is requested."""

    def __init__(self, *, code, options=(), backend="nvrtc"):
        if not isinstance(code, str) or not isinstance(options, tuple) or backend != "nvrtc":
            raise TypeError("code must be a str, options a tuple of str, backend nvrtc")
        self._code, self._options = code, options
        self._program = None

    def get_function(self, name):
        require_device(current.device)
        streams.forbid_while_capturing()
        if self._program is None:
            memory.register_with_emulator()
            self._program = emulator.Program(self._code, self._options, check=setting("CHECK", 0) == 1)
        if name not in self._program.names:
            raise CUDADriverError(f"CUDA_ERROR_NOT_FOUND: named symbol not found ({name})")
        return RawKernel(self._program, name)


class RawKernel:
    def __init__(self, program, name):
        self._program, self.name = program, name
        self._signature = program.signature(name)
        self._opted_in = SHARED_WITHOUT_OPT_IN

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._opted_in

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes):
        most = KNOWN[capability()].shared_per_block
        if nbytes > most:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: invalid argument ({nbytes} of at most {most} bytes)")
        self._opted_in = nbytes

    def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
        queue = streams.queue_for(stream)
        grid = self._dimensions(grid, LARGEST_GRID, "grid")
        block = self._dimensions(block, LARGEST_BLOCK, "block")
        if block[0] * block[1] * block[2] > THREADS_PER_BLOCK:
            raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: invalid argument ({self.name}: block {block})")
        if shared_mem > max(SHARED_WITHOUT_OPT_IN, self._opted_in):
            raise CUDADriverError(
                f"CUDA_ERROR_INVALID_VALUE: invalid argument ({self.name}: {shared_mem} bytes of shared memory, "
                f"max_dynamic_shared_size_bytes is {self._opted_in})"
            )
        if len(args) != len(self._signature):
            raise TypeError(f"{self.name} has {len(self._signature)} parameters, {len(args)} arguments were given")
        values, owners = [], []
        for number, (kind, argument) in enumerate(zip(self._signature, args, strict=True)):
            values.append(self._value(number, kind, argument, owners))
        program, name = self._program, self.name

        def run():
            _schedule()
            program.launch(name, grid, block, tuple(values), shared=shared_mem)

        try:
            queue.add(run, owners)
        except CUDARuntimeError as error:
            if error.status == 901:
                raise CUDADriverError("CUDA_ERROR_STREAM_CAPTURE_INVALIDATED: operation failed") from error
            raise

    def _dimensions(self, given, largest, what):
        if not isinstance(given, tuple) or not 1 <= len(given) <= 3:
            raise TypeError(f"{self.name}: {what} must be a tuple of one to three integers, not {given!r}")
        for size, most in zip(given, largest, strict=False):
            if not isinstance(size, (int, np.integer)):
                raise TypeError(f"{self.name}: {what} {given!r} has other things than integers in it")
            if size < 1:
                raise ValueError(f"{self.name}: {what} {given!r}: CuPy would take 1 for {size}, and launch")
            if size > most:
                raise CUDADriverError(f"CUDA_ERROR_INVALID_VALUE: invalid argument ({self.name}: {what} {given})")
        return (*(int(size) for size in given), 1, 1)[:3]

    def _value(self, number, kind, argument, owners):
        """Check an argument and return its value for the emulator; append the owner of its memory to ``owners``."""
        where = f"argument {number} of {self.name}"
        if kind == "P":
            if argument is None:
                raise TypeError(f"{where} is None: CuPy passes no address of an argument then; use numpy.uint64(0)")
            if type(argument) is np.uint64 and argument == 0:
                return 0
            if not isinstance(argument, ndarray):
                raise TypeError(f"{where} is a pointer; {type(argument).__name__} is no array of a device")
            if argument._owner.device != current.device:
                raise CUDARuntimeError(700, f"{where} is on device {argument._owner.device}, not {current.device}")
            owners.append(argument._owner)
            return argument.data.ptr
        if type(argument) in (bool, int, float):
            became = {bool: "one byte", int: "an int64", float: "a float64"}[type(argument)]
            raise TypeError(f"{where} is a Python {type(argument).__name__}: CuPy would silently pass {became} of it")
        if type(argument) is not SCALARS[kind]:
            raise TypeError(f"{where} must be numpy.{SCALARS[kind].__name__}, not {type(argument).__name__}")
        return argument
