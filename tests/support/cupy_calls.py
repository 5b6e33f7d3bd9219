"""The part of CuPy's interface that llmc uses. test_fake_cupy.py compares it with the fake CuPy, and
test_cupy_signatures.py with the real one."""

CALLS = {
    "RawModule": "*, code, options, backend",
    "RawModule.get_function": "name",
    "RawKernel.__call__": "grid, block, args, *, shared_mem, stream",
    "empty": "shape, dtype",
    "zeros": "shape, dtype",
    "ndarray.reshape": "*shape",
    "ndarray.view": "dtype",
    "ndarray.get": "stream, *, out",
    "ndarray.set": "arr, stream",
    "ndarray.fill": "value",
    "get_default_memory_pool": "",
    "cuda.MemoryPool.used_bytes": "",
    "cuda.MemoryPool.total_bytes": "",
    "cuda.MemoryPool.free_all_blocks": "",
    "cuda.MemoryPool.set_limit": "size",
    "cuda.Device": "device",
    "cuda.Device.use": "",
    "cuda.Device.synchronize": "",
    "cuda.Stream": "null, non_blocking",
    "cuda.Stream.use": "",
    "cuda.Stream.synchronize": "",
    "cuda.Stream.begin_capture": "",
    "cuda.Stream.end_capture": "",
    "cuda.Stream.record": "event",
    "cuda.Stream.wait_event": "event",
    "cuda.Graph.launch": "stream",
    "cuda.Event": "block, disable_timing",
    "cuda.Event.record": "stream",
    "cuda.Event.synchronize": "",
    "cuda.get_elapsed_time": "start_event, end_event",
    "cuda.alloc_pinned_memory": "size",
    "cuda.runtime.getDeviceCount": "",
    "cuda.runtime.getDeviceProperties": "device",
    "cuda.runtime.driverGetVersion": "",
    "cuda.runtime.runtimeGetVersion": "",
    "cuda.runtime.memcpyAsync": "dst, src, size, kind, stream",
    "cuda.runtime.memsetAsync": "ptr, value, size, stream",
    "cuda.cublas.create": "",
}
"""Parameters of functions, by name without ``cupy.``. Parameters after ``*`` are passed by keyword."""

ATTRIBUTES = (
    "RawKernel.max_dynamic_shared_size_bytes",
    "ndarray.shape",
    "ndarray.dtype",
    "ndarray.size",
    "ndarray.nbytes",
    "ndarray.ndim",
    "ndarray.itemsize",
    "cuda.Device.attributes",
    "cuda.Device.compute_capability",
    "cuda.Device.mem_info",
    "cuda.Device.__enter__",
    "cuda.Stream.__enter__",
    "cuda.Stream.null",
    "cuda.Event.done",
)
"""Attributes whose values need a device; the tests only check that they exist."""

ERRORS = {
    "cuda.runtime.CUDARuntimeError": RuntimeError,
    "cuda.driver.CUDADriverError": RuntimeError,
    "cuda.memory.OutOfMemoryError": MemoryError,
}

CONSTANTS = {
    "cuda.runtime.memcpyHostToHost": 0,
    "cuda.runtime.memcpyHostToDevice": 1,
    "cuda.runtime.memcpyDeviceToHost": 2,
    "cuda.runtime.memcpyDeviceToDevice": 3,
    "cuda.runtime.CUDA_R_32F": 0,
    "cuda.runtime.CUDA_R_16BF": 14,
    "cuda.cublas.CUBLAS_OP_N": 0,
    "cuda.cublas.CUBLAS_OP_T": 1,
    "cuda.cublas.CUBLAS_COMPUTE_32F": 68,
    "cuda.cublas.CUBLAS_COMPUTE_32F_PEDANTIC": 69,
    "cuda.cublas.CUBLAS_COMPUTE_32F_FAST_TF32": 77,
    "cuda.cublas.CUBLAS_GEMM_DEFAULT": -1,
}

DEVICE_ATTRIBUTES = (
    "MaxBlocksPerMultiprocessor",
    "MaxRegistersPerBlock",
    "MaxRegistersPerMultiprocessor",
    "MaxSharedMemoryPerBlock",
    "MaxSharedMemoryPerBlockOptin",
    "MaxSharedMemoryPerMultiprocessor",
    "MaxThreadsPerBlock",
    "MaxThreadsPerMultiProcessor",
    "MultiProcessorCount",
    "ReservedSharedMemoryPerBlock",
    "WarpSize",
)
"""Keys of ``Device.attributes``: members of cudaDeviceAttr without the prefix ``cudaDevAttr``."""


def resolve(cupy, name):
    """Return ``cupy.name``, where ``name`` may contain dots."""
    found = cupy
    for part in name.split("."):
        found = getattr(found, part)
    return found


def parameters(text):
    """Split an entry of ``CALLS`` into names of positional and of keyword arguments."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if "*" not in names:
        return names, []
    star = names.index("*")
    return names[:star], names[star + 1 :]
