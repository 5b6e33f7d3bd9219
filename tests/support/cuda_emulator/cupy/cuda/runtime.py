"""The part of the CUDA runtime that the backend calls by address."""

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
    """The allocation on the device in use that holds these bytes."""
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
    """From pinned memory the bytes are read when the copy runs, from other memory of the host at once; a copy to
    memory that is not pinned waits until it has run. Both as the CUDA runtime says of synchronization."""
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
    outside = src if kind == memcpyHostToDevice else dst
    if memory.on_device.find(outside, 1) is not None:
        raise CUDARuntimeError(1, f"{outside:#x} is said to be the host's, and is a device's")
    buffer = memory.pinned.find(outside, size)
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
