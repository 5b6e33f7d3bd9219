"""Functions of the CUDA runtime that the backend calls."""

import ctypes

from cupy._status import RUNTIME_VERSION, CUDARuntimeError, capability, current, device_count, require_device, setting
from cupy.cuda import memory, stream

memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = range(4)
CUDA_R_32F = 0
CUDA_R_16BF = 14


def getDeviceCount():
    return device_count()


def driverGetVersion():
    return setting("DRIVER", 13000)


def runtimeGetVersion():
    return RUNTIME_VERSION


def getDeviceProperties(device):
    require_device(device)
    return {"name": f"llmc emulator {device} sm_{capability()}".encode()}


def owner_of(address, nbytes, what):
    """Return the allocation on the current device that contains these bytes."""
    owner = memory.on_device.find(address, nbytes)
    if owner is None:
        raise CUDARuntimeError(700, f"{what}: {nbytes} bytes at {address:#x} are in no allocation on a device")
    if owner.device != current.device:
        raise CUDARuntimeError(700, f"{what} is on device {owner.device}, in use is device {current.device}")
    return owner


def memcpyAsync(dst, src, size, kind, stream):
    _copy(dst, src, size, kind, _queue(stream))


def memsetAsync(ptr, value, size, stream):
    _set(ptr, value, size, _queue(stream))


def _queue(pointer):
    return stream.queue_of(pointer)


def _copy(dst, src, size, kind, queue):
    """Copy memory with the synchronization that the CUDA runtime documents: pinned memory is read or written when the
    copy runs. Pageable memory is read immediately, and a copy to pageable memory waits for its completion."""
    if size == 0:
        return
    owners = []
    if kind in (memcpyHostToDevice, memcpyDeviceToDevice):
        owners.append(owner_of(dst, size, "destination"))
    if kind in (memcpyDeviceToHost, memcpyDeviceToDevice):
        owners.append(owner_of(src, size, "source"))
    if not owners:
        raise CUDARuntimeError(1, f"kind {kind}: only between host and device, and within a device")
    if kind == memcpyDeviceToDevice:
        if abs(dst - src) < size:
            raise CUDARuntimeError(1, "source and destination overlap")
        queue.add(lambda: ctypes.memmove(dst, src, size), owners)
        return
    host = src if kind == memcpyHostToDevice else dst
    if memory.on_device.find(host, 1) is not None:
        raise CUDARuntimeError(1, f"{host:#x} is said to be the host's, and is a device's")
    buffer = memory.pinned.find(host, size)
    if buffer is not None:
        queue.add(lambda: ctypes.memmove(dst, src, size), [*owners, buffer])
        return
    queue.forbid_while_capturing()
    if kind == memcpyHostToDevice:
        values = ctypes.string_at(src, size)
        queue.add(lambda: ctypes.memmove(dst, values, size), owners)
    else:
        queue.add(lambda: ctypes.memmove(dst, src, size), owners)
        queue.synchronize()


def _set(address, value, size, queue):
    if size:
        queue.add(lambda: ctypes.memset(address, value, size), [owner_of(address, size, "destination")])
