"""Which machine is fake_cupy, and the errors that it answers with.

The environment is read anew at every use, so that a test may change it:

    LLMC_EMULATOR_DRIVER      version of the driver, as 12040; 0: none (default 13000)
    LLMC_EMULATOR_DEVICES     number of devices (default 1)
    LLMC_EMULATOR_CAPABILITY  compute capability of all devices, as 75 (default 90)
    LLMC_EMULATOR_MEMORY      bytes of memory on each device (default 8 GiB)
    LLMC_EMULATOR_CHECK       1: kernels run with the emulator's checks
    LLMC_EMULATOR_SEED        shuffles blocks, threads, and what runs when on different streams
"""

import os
import threading

from architectures import KNOWN

RUNTIME_VERSION = 12090  # of the wheels for CUDA 12; any driver from 12.0 on will do for it
OLDEST_DRIVER = 12000

STATUSES = {
    1: ("cudaErrorInvalidValue", "invalid argument"),
    35: ("cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"),
    100: ("cudaErrorNoDevice", "no CUDA-capable device is detected"),
    101: ("cudaErrorInvalidDevice", "invalid device ordinal"),
    400: ("cudaErrorInvalidResourceHandle", "invalid resource handle"),
    600: ("cudaErrorNotReady", "device not ready"),
    700: ("cudaErrorIllegalAddress", "an illegal memory access was encountered"),
    900: ("cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"),
    901: (
        "cudaErrorStreamCaptureInvalidated",
        "operation failed due to a previous error during capture",
    ),
    906: (
        "cudaErrorStreamCaptureImplicit",
        "operation would make the legacy stream depend on a capturing blocking stream",
    ),
}


class CUDARuntimeError(RuntimeError):
    """As the real one: "name: description"; ``why`` is what only a fake can tell."""

    def __init__(self, status, why=""):
        self.status = status
        super().__init__(": ".join(STATUSES[status]) + (f" ({why})" if why else ""))


class CUDADriverError(RuntimeError):
    """What launches and function attributes answer with."""


def setting(name, default):
    return int(os.environ.get(f"LLMC_EMULATOR_{name}", default))


def capability():
    found = setting("CAPABILITY", 90)
    if found not in KNOWN:
        raise ValueError(f"LLMC_EMULATOR_CAPABILITY={found}: known are {', '.join(map(str, KNOWN))}")
    return found


def device_count():
    """How many devices there are; raises as the runtime does where there is no driver or no device."""
    if setting("DRIVER", 13000) < OLDEST_DRIVER:
        raise CUDARuntimeError(35)
    count = setting("DEVICES", 1)
    if count == 0:
        raise CUDARuntimeError(100)
    return count


def require_device(number):
    if not 0 <= number < device_count():
        raise CUDARuntimeError(101)


class _Current(threading.local):
    """Device and streams in use are a thread's own, as in CuPy."""

    def __init__(self):
        self.device = 0
        self.streams = []  # (device, stream pointer) of `with` blocks, innermost last
        self.used = {}  # device: pointer of the stream that use() named


current = _Current()
