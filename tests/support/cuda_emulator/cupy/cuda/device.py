"""Devices: their attributes and free memory."""

from architectures import KNOWN, REGISTERS, SHARED_WITHOUT_OPT_IN, THREADS_PER_BLOCK

from cupy._status import capability, current, require_device
from cupy.cuda import memory, stream


class Device:
    """A device, given by its number; by default the current device."""

    def __init__(self, device=None):
        if device is None:
            require_device(current.device)
        self.id = current.device if device is None else int(device)
        self._previous = []

    def use(self):
        require_device(self.id)
        current.device = self.id

    def __enter__(self):
        previous = current.device
        self.use()
        self._previous.append(previous)
        return self

    def __exit__(self, *details):
        current.device = self._previous.pop()

    def synchronize(self):
        with self:
            stream.synchronize_device()

    @property
    def compute_capability(self):
        require_device(self.id)
        return str(capability())

    @property
    def mem_info(self):
        with self:
            return memory.mem_info()

    @property
    def attributes(self):
        """Device attributes by their names in cudaDeviceAttr, without the prefix ``cudaDevAttr``."""
        require_device(self.id)
        limits = KNOWN[capability()]
        return {
            "MaxBlocksPerMultiprocessor": limits.blocks_per_multiprocessor,
            "MaxRegistersPerBlock": REGISTERS,
            "MaxRegistersPerMultiprocessor": REGISTERS,
            "MaxSharedMemoryPerBlock": SHARED_WITHOUT_OPT_IN,
            "MaxSharedMemoryPerBlockOptin": limits.shared_per_block,
            "MaxSharedMemoryPerMultiprocessor": limits.shared_per_multiprocessor,
            "MaxThreadsPerBlock": THREADS_PER_BLOCK,
            "MaxThreadsPerMultiProcessor": limits.threads_per_multiprocessor,
            "MultiProcessorCount": limits.multiprocessors,
            "ReservedSharedMemoryPerBlock": limits.shared_reserved,
            "WarpSize": 32,
        }
