"""One CUDA device through CuPy: its memory, its stream, kernels compiled when they are first launched.

Nothing else imports CuPy. Of CuPy only these are used: raw modules, memory, streams, events, copies, graphs and cuBLAS
(``blas.py``); what computes are the kernels of this folder.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc_cli.errors import MissingError
from llmc_cli.formats import bfloat16
from llmc_cli.kernels.cuda.source import source
from llmc_cli.kernels.spec import Array

OPTIONS = ("-std=c++17",)
"""What every kernel is compiled with, beside what CuPy adds."""

PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x", "cupy")
LIBRARIES = "pip install 'llmc-cli[cuda13]' or 'llmc-cli[cuda12]' brings the libraries that CuPy needs"
OLDEST = 75  # compute capability times ten: the oldest that CUDA 13 compiles for
TENSOR_CORES = 80  # the oldest with bf16 tensor cores and asynchronous copies

NULL = np.uint64(0)  # CuPy passes a NumPy scalar by its own size: as wide as a pointer
FREE_SHARED = 48 << 10  # bytes of shared memory that need not be opted in to
STAGED = 1 << 20  # bytes: smaller arrays are uploaded without waiting for them


class CublasError(RuntimeError):
    """cuBLAS has answered with an error."""


class CaptureError(RuntimeError):
    """Launches could not be made a graph; nothing has been launched."""


@dataclass
class _Staging:
    """Page-locked memory from which one array is filled, and when it was last read. What is uploaded ahead waits in
    ``near``, on the device, until its turn; ``taken``: when that was last read."""

    memory: NDArray[np.uint8]
    read: Any  # events, both
    taken: Any
    near: Array | None = None


class Graph:
    """Launches as they were captured: the same kernels, with the same arguments. Whatever memory they name stays
    theirs as long as this exists."""

    def __init__(self, device: "Device", graph: Any, memory: list[Any]) -> None:
        self._device, self._graph, self._memory = device, graph, memory

    def launch(self) -> None:
        """All of them, as one launch."""
        self._graph.launch(self._device.stream)
        self._device.launches += 1


class Device:
    """Device ``index``, its kernels with activations in bfloat16 (``bf16``, from capability 8.0 on) or float32.

    MissingError as ``find`` has it.
    """

    def __init__(self, index: int, bf16: bool) -> None:
        self.name, self.capability = find(index)
        cupy = self._cupy = _import_cupy()
        self.index, self.bf16 = index, bf16
        self.tensor_cores = self.capability >= TENSOR_CORES
        self.real: Any = np.uint16 if bf16 else np.float32
        self._device = cupy.cuda.Device(index)
        self._device.use()
        self.stream, self._ahead = _stream(index), _stream(index, "ahead")
        self.stream.use()
        self._options = (*OPTIONS, "-DREAL_BF16") if bf16 else OPTIONS
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._staging: dict[int, _Staging] = {}
        self._captured: list[Any] | None = None  # while capturing: the arguments of what is captured
        self.launches = 0

    def alloc(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Zeroed memory, aligned to 512 bytes."""
        self._forbid_while_capturing("memory is allocated")
        return self._cupy.zeros(shape, dtype)

    def free_bytes(self) -> int:
        """Memory that could still be allocated."""
        free, _ = self._device.mem_info
        return int(free)

    def held_bytes(self) -> int:
        """Memory that arrays have taken from the device, those that are gone included: it is kept for others."""
        return int(self._cupy.get_default_memory_pool().total_bytes())

    def release(self) -> None:
        """Give back what is kept of arrays that are gone."""
        self.synchronize()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        """Fill ``array``, contiguous, with values from the host, which may change as soon as this returns."""
        self._forbid_while_capturing("values come from the host")
        values = np.ascontiguousarray(_converted(values, array.dtype))
        if not values.nbytes:
            return
        if values.nbytes > STAGED:
            array.set(values)
            return
        staging = self._staged(array, values)
        self._copy_staged(array, staging, values.nbytes, self.stream)

    def upload_async(self, array: Array, values: NDArray[Any]) -> None:
        """As ``upload``. The values are carried over to the device at once, on a stream of their own, and put in place
        behind all that has been launched."""
        self._forbid_while_capturing("values come from the host")
        values = np.ascontiguousarray(_converted(values, array.dtype))
        staging = self._staged(array, values)
        if staging.near is None or staging.near.nbytes != array.nbytes:  # of an array that had this address before
            staging.near = self.alloc(array.shape, array.dtype)
            staging.taken.record(self.stream)  # it has been zeroed there
        self._ahead.wait_event(staging.taken)
        self._copy_staged(staging.near, staging, values.nbytes, self._ahead)
        self.stream.wait_event(staging.read)
        self.copy(array, staging.near)
        staging.taken.record(self.stream)

    def _staged(self, array: Array, values: NDArray[Any]) -> _Staging:
        """What ``array`` is filled from, with ``values`` in it."""
        staging = self._staging.get(array.data.ptr)
        if staging is not None:
            staging.read.synchronize()
        if staging is None or staging.memory.nbytes < values.nbytes:
            pinned = self._cupy.cuda.alloc_pinned_memory(values.nbytes)
            events = (self._cupy.cuda.Event(disable_timing=True) for _ in range(2))
            staging = _Staging(np.frombuffer(pinned, np.uint8, values.nbytes), *events)
            self._staging[array.data.ptr] = staging
        staging.memory[: values.nbytes] = values.reshape(-1).view(np.uint8)
        return staging

    def _copy_staged(self, target: Array, staging: _Staging, size: int, stream: Any) -> None:
        runtime = self._cupy.cuda.runtime
        address = staging.memory.ctypes.data
        runtime.memcpyAsync(target.data.ptr, address, size, runtime.memcpyHostToDevice, stream.ptr)
        staging.read.record(stream)

    def download(self, array: Array) -> NDArray[Any]:
        """A copy on the host, bfloat16 as float32, after everything that has been launched."""
        values: NDArray[Any] = array.get()
        if values.dtype != np.uint16:
            return values
        single = np.empty(values.shape, np.float32)
        bfloat16.to_float32(values, single)
        return single

    def copy(self, target: Array, source: Array) -> None:
        runtime = self._cupy.cuda.runtime
        kind, stream = runtime.memcpyDeviceToDevice, self.stream.ptr
        runtime.memcpyAsync(target.data.ptr, source.data.ptr, source.nbytes, kind, stream)
        if self._captured is not None:
            self._captured.append((target, source))

    def synchronize(self) -> None:
        self.stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` launches, without launching it now. It may launch kernels that have been launched before, and
        copy from array to array: all else would be done once, or not at all, where it is meant to be done each time.
        CaptureError where CUDA or cuBLAS will not have it so."""
        memory: list[Any] = []
        failures = self._cupy.cuda.runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError
        try:
            self.stream.begin_capture()
            self._captured = memory
            try:
                work()
            except BaseException:
                with contextlib.suppress(*failures):  # that it failed is known
                    self.stream.end_capture()
                raise
            finally:
                self._captured = None
            return Graph(self, self.stream.end_capture(), memory)
        except (*failures, CublasError) as error:
            raise CaptureError(_first_line(error)) from error

    def _forbid_while_capturing(self, what: str) -> None:
        if self._captured is not None:
            raise RuntimeError(f"{what} while work is captured")

    def cublas(self) -> Any:
        """CuPy's binding of cuBLAS. MissingError where that is not installed."""
        try:
            return self._cupy.cuda.cublas
        except ImportError as error:
            raise MissingError(f"--device cuda: {_first_line(error)}; {LIBRARIES}") from error

    def cublas_library(self) -> Any:
        """The cuBLAS that CuPy's binding has loaded."""
        major = self._cupy.cuda.runtime.runtimeGetVersion() // 1000
        name = f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}"
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            raise MissingError(f"--device cuda: {_first_line(error)}; {LIBRARIES}") from error

    def launch(
        self,
        file: str,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple[Any, ...],
        shared: int = 0,
    ) -> None:
        """Launch a kernel of ``file``.cu with ``shared`` bytes of dynamic shared memory.

        ``args``: device arrays, None for a null pointer, and NumPy scalars of exactly the kernel's types: a Python
        number would arrive as 8 bytes, whatever the kernel takes.
        """
        function = self._kernels.get(kernel) or self._load(file, kernel)
        if shared > FREE_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        function(grid, block, tuple(NULL if each is None else each for each in args), shared_mem=shared)
        self.account(*args)

    def account(self, *arguments: Any) -> None:
        """Count a kernel or a product that was launched, or, while capturing, keep the memory that it names."""
        if self._captured is None:
            self.launches += 1
        else:
            self._captured.append(arguments)

    def _load(self, file: str, kernel: str) -> Any:
        self._forbid_while_capturing("a kernel is loaded")
        if file not in self._modules:
            self._modules[file] = self._cupy.RawModule(code=source(file), options=self._options)
        try:
            function = self._kernels[kernel] = self._modules[file].get_function(kernel)  # compiles the file
        except ImportError as error:
            raise MissingError(f"--device cuda: {_first_line(error)}; {LIBRARIES}") from error
        return function


@functools.cache
def _stream(index: int, purpose: str = "all") -> Any:
    """A stream of the device in use, which is ``index``: one for all that is opened on it, since CuPy allocates, copies
    and launches on the one stream that its thread has in use; another one for what is uploaded ahead."""
    return _import_cupy().cuda.Stream(non_blocking=True)


def _converted(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Host values as ``dtype``, in which uint16 stands for bfloat16."""
    if dtype != np.uint16 or values.dtype == np.uint16:
        return values.astype(dtype, copy=False)
    single = np.ascontiguousarray(values, np.float32)
    bits = np.empty(single.shape, np.uint16)
    bfloat16.from_float32(single, bits)
    return bits


def _import_cupy() -> Any:
    """The module; MissingError where it is not installed, is installed twice, or lacks libraries of its own."""
    found = [name for name in PACKAGES if _is_installed(name)]
    if len(found) > 1:
        raise MissingError(
            f"--device cuda: {' and '.join(found)} are both installed, and each overwrites files of the other; "
            f"pip uninstall {' '.join(found)}, then install one of them"
        )
    if importlib.util.find_spec("cupy") is None:
        raise MissingError(
            "--device cuda: CuPy is not installed; pip install 'llmc-cli[cuda13]', or 'llmc-cli[cuda12]' for a driver "
            "older than 580 (nvidia-smi shows it)"
        )
    try:
        import cupy
    except Exception as error:  # whatever a library that fails to load makes of it
        raise MissingError(f"--device cuda: CuPy is installed but cannot be loaded: {_first_line(error)}") from error
    return cupy


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def find(index: int) -> tuple[str, int]:
    """A device's name, and its compute capability times ten. MissingError, which says what to do, where there is no
    CuPy, driver or device, or the device is too old."""
    cupy = _import_cupy()
    runtime = cupy.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
    except runtime.CUDARuntimeError:
        driver = 0
    if not driver:
        raise MissingError(
            "--device cuda: there is no NVIDIA driver here; install one (nvidia-smi shows it), or use --device cpu"
        )
    needed = runtime.runtimeGetVersion()
    if driver // 1000 < needed // 1000:
        raise MissingError(
            f"--device cuda: the driver is of CUDA {_version(driver)}, and the CuPy that is installed needs "
            f"{needed // 1000}; install a newer driver, or 'llmc-cli[cuda12]' in place of cupy-cuda13x"
        )
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise MissingError(f"--device cuda: no device can be used: {error}") from error
    if not count:
        raise MissingError(
            "--device cuda: there is a driver, but no device (see CUDA_VISIBLE_DEVICES); use --device cpu"
        )
    if index >= count:
        there = "is one, cuda:0" if count == 1 else f"are {count}, cuda:0 to cuda:{count - 1}"
        raise MissingError(f"--device cuda:{index}: there {there}")
    try:
        capability = int(cupy.cuda.Device(index).compute_capability)
        name = runtime.getDeviceProperties(index)["name"].decode()
    except runtime.CUDARuntimeError as error:
        raise MissingError(f"--device cuda:{index}: the device cannot be used: {error}") from error
    if capability < OLDEST:
        raise MissingError(
            f"--device cuda:{index}: {name} has compute capability {capability / 10}, and {OLDEST / 10} (Turing) is "
            "the oldest that is supported; use --device cpu"
        )
    return name, capability


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
