"""Memory of the devices and pinned memory of the host: NumPy arrays that are known by their addresses."""

import ctypes
import weakref
from bisect import bisect_right, insort

import emulator
import numpy as np

from cupy._status import current, require_device, setting
from cupy.cuda import stream

UNIT = 512  # CuPy's pool rounds sizes up to it, and aligns to it
POISON = 0xFF  # fresh memory: NaN to float and to bf16, -1 to int


class OutOfMemoryError(MemoryError):
    pass


class _Addresses:
    """Finds who owns an address."""

    def __init__(self):
        self._starts = []
        self._owners = weakref.WeakValueDictionary()

    def add(self, owner, address):
        insort(self._starts, address)
        self._owners[address] = owner

    def remove(self, address):
        self._starts.remove(address)
        self._owners.pop(address, None)

    def __iter__(self):
        return iter(list(self._owners.values()))

    def find(self, address, nbytes):
        """Who owns all ``nbytes`` bytes from ``address`` on; None where nobody does."""
        at = bisect_right(self._starts, address) - 1
        owner = self._owners.get(self._starts[at]) if at >= 0 else None
        return owner if owner is not None and address + nbytes <= owner.address + owner.nbytes else None


on_device = _Addresses()
pinned = _Addresses()


class Allocation:
    """Bytes on a device. They live as long as somebody holds this object."""

    def __init__(self, nbytes):
        require_device(current.device)
        stream.forbid_while_capturing()
        self.device = current.device
        self.nbytes = nbytes
        self.address = 0
        rounded = -(-nbytes // UNIT) * UNIT
        pool = _pool_of(self.device)
        pool.take(rounded)
        whole = np.empty(nbytes + UNIT, np.uint8)
        start = -whole.ctypes.data % UNIT
        self.bytes = whole[start : start + nbytes]
        self.bytes.fill(POISON)
        if nbytes:
            self.address = self.bytes.ctypes.data
            on_device.add(self, self.address)
            if _kernels_know:
                emulator.register(self.address, nbytes)
        weakref.finalize(self, _free, pool, rounded, self.address)


def _free(pool, rounded, address):
    pool.used -= rounded
    if address:
        on_device.remove(address)
        if _kernels_know:
            emulator.unregister(address)


_kernels_know = False


def tell_kernels():
    """From now on the emulator knows what memory there is; before, nothing needs it, nor a compiler."""
    global _kernels_know
    if not _kernels_know:
        for owner in on_device:
            emulator.register(owner.address, owner.nbytes)
        _kernels_know = True


class _Pool:
    """What one device's memory is used for; freed blocks stay with the pool until they are given back."""

    def __init__(self):
        self.used = self.total = self.limit = 0

    def take(self, nbytes):
        limit = min(self.limit or setting("MEMORY", 8 << 30), setting("MEMORY", 8 << 30))
        if self.used + nbytes > limit:
            raise OutOfMemoryError(
                f"Out of memory allocating {nbytes:,} bytes (allocated so far: {self.used:,} bytes, "
                f"limit set to: {limit:,} bytes)."
            )
        self.used += nbytes
        self.total = max(self.total, self.used)


_pools = {}


def _pool_of(device):
    return _pools.setdefault(device, _Pool())


class MemoryPool:
    """The pool of the device in use."""

    def used_bytes(self):
        return _pool_of(current.device).used

    def total_bytes(self):
        return _pool_of(current.device).total

    def free_all_blocks(self):
        pool = _pool_of(current.device)
        pool.total = pool.used

    def set_limit(self, size=None):
        require_device(current.device)
        _pool_of(current.device).limit = size or 0


def mem_info():
    """(free, total) bytes of the device in use: what the pool holds is not free, whether it is used or not."""
    total = setting("MEMORY", 8 << 30)
    return total - _pool_of(current.device).total, total


def alloc_pinned_memory(size):
    """A buffer of at least ``size`` bytes for ``numpy.frombuffer``, with its address as ``ptr``."""
    require_device(current.device)
    stream.forbid_while_capturing()
    nbytes = max(1, -(-size // UNIT)) * UNIT
    kind = type("PinnedMemoryPointer", (ctypes.c_ubyte * nbytes,), {})
    buffer = kind()
    ctypes.memset(buffer, POISON, nbytes)
    buffer.ptr = buffer.address = ctypes.addressof(buffer)
    buffer.nbytes = nbytes
    pinned.add(buffer, buffer.address)
    weakref.finalize(buffer, pinned.remove, buffer.address)
    return buffer
