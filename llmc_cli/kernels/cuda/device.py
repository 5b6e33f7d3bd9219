"""A CUDA device accessed through CuPy: memory, streams, CUDA graphs, and kernels compiled on first launch.

This is the only module that imports CuPy. It uses raw modules, memory, streams, events, copies, graphs and cuBLAS
(``blas.py``), and none of CuPy's array operations: all computation is in the kernels of this folder.
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
"""Compiler options of every kernel, in addition to those that CuPy adds."""

PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x", "cupy")
INSTALL = "run pip install 'llmc-cli[cuda13]' or 'llmc-cli[cuda12]' for the libraries that CuPy needs"
MIN_CAPABILITY = 75  # compute capability times ten: the oldest architecture that CUDA 13 supports
TENSOR_CORES = 80  # the oldest with bf16 tensor cores and asynchronous copies

NULL = np.uint64(0)  # CuPy passes NumPy scalars by value with their own size: this one is as wide as a pointer
DEFAULT_SHARED = 48 << 10  # bytes of dynamic shared memory available without opting in
STAGING_LIMIT = 1 << 20  # bytes: arrays up to this size are uploaded asynchronously through page-locked memory


class CublasError(RuntimeError):
    """A cuBLAS call returned an error status."""


class CaptureError(RuntimeError):
    """Work could not be captured in a CUDA graph. Nothing has been launched."""


@dataclass
class _Staging:
    """Buffers for asynchronous uploads to one array.

    ``host`` is page-locked. Prefetched values go through ``prefetched`` on the device, from which they are copied to
    the array in stream order. The events mark the last read of each buffer.
    """

    host: NDArray[np.uint8]
    host_read: Any
    prefetched_read: Any
    prefetched: Array | None = None


class Graph:
    """A captured CUDA graph: the same launches with the same arguments. It keeps the memory they refer to alive."""

    def __init__(self, device: "Device", graph: Any, memory: list[Any]) -> None:
        self._device, self._graph, self._memory = device, graph, memory

    def launch(self) -> None:
        """Launch the graph."""
        self._graph.launch(self._device.stream)
        self._device.launches += 1


class Device:
    """Device ``index``, with kernels for activations in bfloat16 (``bf16``; requires capability 8.0) or float32.

    Raises MissingError as ``find`` does.
    """

    def __init__(self, index: int, bf16: bool) -> None:
        self.name, self.capability = find(index)
        cupy = self._cupy = _import_cupy()
        self.index, self.bf16 = index, bf16
        self.tensor_cores = self.capability >= TENSOR_CORES
        self.real: Any = np.uint16 if bf16 else np.float32
        self._device = cupy.cuda.Device(index)
        self._device.use()
        self.stream, self._prefetch_stream = _stream(index), _stream(index, "prefetch")
        self.stream.use()
        self._options = (*OPTIONS, "-DREAL_BF16") if bf16 else OPTIONS
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._staging: dict[int, _Staging] = {}
        self._captured: list[Any] | None = None  # during capture: the arguments of the captured launches
        self.launches = 0

    def alloc(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return a zeroed array aligned to 512 bytes."""
        self._forbid_during_capture("allocate memory")
        return self._cupy.zeros(shape, dtype)

    def free_bytes(self) -> int:
        """Return the number of bytes that can still be allocated."""
        free, _ = self._device.mem_info
        return int(free)

    def held_bytes(self) -> int:
        """Return the number of bytes held by CuPy's memory pool, freed blocks included."""
        return int(self._cupy.get_default_memory_pool().total_bytes())

    def release(self) -> None:
        """Return the pool's freed blocks to the device."""
        self.synchronize()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        """Copy host values to ``array``, which must be contiguous. ``values`` may be modified after this returns."""
        self._forbid_during_capture("upload values from the host")
        values = np.ascontiguousarray(_converted(values, array.dtype))
        if not values.nbytes:
            return
        if values.nbytes > STAGING_LIMIT:
            array.set(values)
            return
        staging = self._staged(array, values)
        self._copy_staged(array, staging, values.nbytes, self.stream)

    def upload_async(self, array: Array, values: NDArray[Any]) -> None:
        """Transfer host values to the device now, on a separate stream, and copy them to ``array`` after all work
        launched so far. ``values`` may be modified after this returns."""
        self._forbid_during_capture("upload values from the host")
        values = np.ascontiguousarray(_converted(values, array.dtype))
        staging = self._staged(array, values)
        if staging.prefetched is None or staging.prefetched.nbytes != array.nbytes:  # None, or of an earlier array here
            staging.prefetched = self.alloc(array.shape, array.dtype)
            staging.prefetched_read.record(self.stream)  # the zeroing runs on this stream
        self._prefetch_stream.wait_event(staging.prefetched_read)
        self._copy_staged(staging.prefetched, staging, values.nbytes, self._prefetch_stream)
        self.stream.wait_event(staging.host_read)
        self.copy(array, staging.prefetched)
        staging.prefetched_read.record(self.stream)

    def _staged(self, array: Array, values: NDArray[Any]) -> _Staging:
        """Return the staging buffers of ``array`` with ``values`` in host memory."""
        staging = self._staging.get(array.data.ptr)
        if staging is not None:
            staging.host_read.synchronize()
        if staging is None or staging.host.nbytes < values.nbytes:
            pinned = self._cupy.cuda.alloc_pinned_memory(values.nbytes)
            events = (self._cupy.cuda.Event(disable_timing=True) for _ in range(2))
            staging = _Staging(np.frombuffer(pinned, np.uint8, values.nbytes), *events)
            self._staging[array.data.ptr] = staging
        staging.host[: values.nbytes] = values.reshape(-1).view(np.uint8)
        return staging

    def _copy_staged(self, target: Array, staging: _Staging, size: int, stream: Any) -> None:
        runtime = self._cupy.cuda.runtime
        address = staging.host.ctypes.data
        runtime.memcpyAsync(target.data.ptr, address, size, runtime.memcpyHostToDevice, stream.ptr)
        staging.host_read.record(stream)

    def download(self, array: Array) -> NDArray[Any]:
        """Return a host copy, bfloat16 as float32, after all launched work has finished."""
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
        """Return a graph of what ``work`` launches, without running it.

        ``work`` may only launch kernels and products that have been launched before and copy between device arrays; a
        graph would not repeat anything else. Raises CaptureError if CUDA or cuBLAS rejects the capture.
        """
        memory: list[Any] = []
        failures = self._cupy.cuda.runtime.CUDARuntimeError, self._cupy.cuda.driver.CUDADriverError
        try:
            self.stream.begin_capture()
            self._captured = memory
            try:
                work()
            except BaseException:
                with contextlib.suppress(*failures):  # the original error is raised below
                    self.stream.end_capture()
                raise
            finally:
                self._captured = None
            return Graph(self, self.stream.end_capture(), memory)
        except (*failures, CublasError) as error:
            raise CaptureError(_first_line(error)) from error

    def _forbid_during_capture(self, action: str) -> None:
        if self._captured is not None:
            raise RuntimeError(f"cannot {action} during CUDA graph capture")

    def cublas(self) -> Any:
        """Return CuPy's cuBLAS bindings. Raises MissingError if cuBLAS is not installed."""
        try:
            return self._cupy.cuda.cublas
        except ImportError as error:
            raise MissingError(f"--device cuda: {_first_line(error)}; {INSTALL}") from error

    def cublas_library(self) -> Any:
        """Return the cuBLAS library that CuPy's bindings have loaded."""
        major = self._cupy.cuda.runtime.runtimeGetVersion() // 1000
        name = f"cublas64_{major}.dll" if sys.platform == "win32" else f"libcublas.so.{major}"
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            raise MissingError(f"--device cuda: {_first_line(error)}; {INSTALL}") from error

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

        ``args`` are device arrays, None for a null pointer, and NumPy scalars of exactly the kernel's parameter types.
        CuPy would pass a Python number as 8 bytes whatever the parameter's type.
        """
        function = self._kernels.get(kernel) or self._load(file, kernel)
        if shared > DEFAULT_SHARED and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        function(grid, block, tuple(NULL if each is None else each for each in args), shared_mem=shared)
        self.record_launch(*args)

    def record_launch(self, *arguments: Any) -> None:
        """Count the launch of a kernel or product. During capture, keep references to its arguments instead."""
        if self._captured is None:
            self.launches += 1
        else:
            self._captured.append(arguments)

    def _load(self, file: str, kernel: str) -> Any:
        self._forbid_during_capture("load a kernel")
        if file not in self._modules:
            self._modules[file] = self._cupy.RawModule(code=source(file), options=self._options)
        try:
            function = self._kernels[kernel] = self._modules[file].get_function(kernel)  # compiles the file
        except ImportError as error:
            raise MissingError(f"--device cuda: {_first_line(error)}; {INSTALL}") from error
        return function


@functools.cache
def _stream(index: int, purpose: str = "compute") -> Any:
    """Return the stream for ``purpose`` on the current device, which must be ``index``. All Device objects of an index
    share it, because CuPy allocates, copies and launches on the thread's current stream."""
    return _import_cupy().cuda.Stream(non_blocking=True)


def _converted(values: NDArray[Any], dtype: Any) -> NDArray[Any]:
    """Return host values converted to ``dtype``, where uint16 means bfloat16 bits."""
    if dtype != np.uint16 or values.dtype == np.uint16:
        return values.astype(dtype, copy=False)
    single = np.ascontiguousarray(values, np.float32)
    bits = np.empty(single.shape, np.uint16)
    bfloat16.from_float32(single, bits)
    return bits


def _import_cupy() -> Any:
    """Import CuPy. Raise MissingError if it is not installed, installed twice, or cannot be loaded."""
    found = [name for name in PACKAGES if _is_installed(name)]
    if len(found) > 1:
        raise MissingError(
            f"--device cuda: {' and '.join(found)} are both installed and overwrite each other's files; "
            f"run pip uninstall {' '.join(found)}, then install one of them"
        )
    if importlib.util.find_spec("cupy") is None:
        raise MissingError(
            "--device cuda: CuPy is not installed; run pip install 'llmc-cli[cuda13]', or 'llmc-cli[cuda12]' for a "
            "driver older than 580 (see nvidia-smi)"
        )
    try:
        import cupy
    except Exception as error:  # a library that fails to load can raise anything
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
    """Return a device's name and its compute capability times ten. Raise MissingError if CuPy, the driver or the device
    is missing or too old."""
    cupy = _import_cupy()
    runtime = cupy.cuda.runtime
    try:
        driver = runtime.driverGetVersion()
    except runtime.CUDARuntimeError:
        driver = 0
    if not driver:
        raise MissingError(
            "--device cuda: no NVIDIA driver found; install one (check with nvidia-smi), or use --device cpu"
        )
    needed = runtime.runtimeGetVersion()
    if driver // 1000 < needed // 1000:
        raise MissingError(
            f"--device cuda: the driver supports CUDA {_version(driver)}, but the installed CuPy needs CUDA "
            f"{needed // 1000}; install a newer driver, or 'llmc-cli[cuda12]' instead of cupy-cuda13x"
        )
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise MissingError(f"--device cuda: no usable device: {error}") from error
    if not count:
        raise MissingError(
            "--device cuda: the NVIDIA driver reports no devices; check CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    if index >= count:
        available = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise MissingError(f"--device cuda:{index}: no such device; available: {available}")
    try:
        capability = int(cupy.cuda.Device(index).compute_capability)
        name = runtime.getDeviceProperties(index)["name"].decode()
    except runtime.CUDARuntimeError as error:
        raise MissingError(f"--device cuda:{index}: the device cannot be used: {error}") from error
    if capability < MIN_CAPABILITY:
        raise MissingError(
            f"--device cuda:{index}: {name} has compute capability {capability / 10}; the minimum is "
            f"{MIN_CAPABILITY / 10} (Turing); use --device cpu"
        )
    return name, capability


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
