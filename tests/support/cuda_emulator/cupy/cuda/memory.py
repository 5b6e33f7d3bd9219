"""Device memory and pinned host memory. Both are ordinary host memory, found by address."""

import ctypes
import weakref
from bisect import bisect_right, insort

import emulator
import numpy as np

from cupy._status import current, require_device, setting
from cupy.cuda import stream

UNIT = 512  # CuPy's pool rounds sizes up to multiples of it and aligns addresses to it
POISON = 0xFF  # content of new memory: NaN as float32 and bf16, -1 as int


class OutOfMemoryError(MemoryError):
    pass


class _Addresses:
    """Owners of memory, found by address."""

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
        """Return the owner of the ``nbytes`` bytes at ``address``, or None if no owner has all of them."""
        index = bisect_right(self._starts, address) - 1
        owner = self._owners.get(self._starts[index]) if index >= 0 else None
        return owner if owner is not None and address + nbytes <= owner.address + owner.nbytes else None


on_device = _Addresses()
pinned = _Addresses()


class Allocation:
    """Device memory, freed when this object is deleted."""

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
            if _registered:
                emulator.register(self.address, nbytes)
        weakref.finalize(self, _free, pool, rounded, self.address)


def _free(pool, rounded, address):
    pool.used -= rounded
    if address:
        on_device.remove(address)
        if _registered:
            emulator.unregister(address)


_registered = False


def register_with_emulator():
    """Register all device memory with the emulator, now and in future. This needs a compiler; only kernels need it."""
    global _registered
    if not _registered:
        for owner in on_device:
            emulator.register(owner.address, owner.nbytes)
        _registered = True


class _Pool:
    """Memory usage of a device. Like CuPy's pool, it holds freed blocks until ``free_all_blocks``."""

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
    """The memory pool of the current device."""

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
    """Return (free, total) bytes of the current device. Memory held by the pool is not free, even if it is unused."""
    total = setting("MEMORY", 8 << 30)
    return total - _pool_of(current.device).total, total


def alloc_pinned_memory(size):
    """Return a buffer of at least ``size`` bytes for ``numpy.frombuffer``, with its address as ``ptr``."""
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
