"""The simulated machine, errors, and the current device and streams.

Environment variables describe the machine. They are read at every use, so that a test can change them:

    LLMC_EMULATOR_DRIVER      driver version, such as 12040, or 0 for no driver (default 13000)
    LLMC_EMULATOR_DEVICES     number of devices (default 1)
    LLMC_EMULATOR_CAPABILITY  compute capability of all devices, such as 75 (default 90)
    LLMC_EMULATOR_MEMORY      bytes of memory per device (default 8 GiB)
    LLMC_EMULATOR_CHECK       1: run kernels with the emulator's checks (default 0)
    LLMC_EMULATOR_SEED        seed that shuffles blocks, threads and the order of work on different streams
"""

import os
import threading

from architectures import KNOWN

RUNTIME_VERSION = 12090  # version in the wheels for CUDA 12, which need driver 12.0 or later
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
    """An error with CUDA's text, "name: description", and the reason, which only the fake knows."""

    def __init__(self, status, reason=""):
        self.status = status
        super().__init__(": ".join(STATUSES[status]) + (f" ({reason})" if reason else ""))


class CUDADriverError(RuntimeError):
    """An error of a kernel launch, a function lookup or a function attribute."""


def setting(name, default):
    return int(os.environ.get(f"LLMC_EMULATOR_{name}", default))


def capability():
    found = setting("CAPABILITY", 90)
    if found not in KNOWN:
        raise ValueError(f"LLMC_EMULATOR_CAPABILITY={found}: known are {', '.join(map(str, KNOWN))}")
    return found


def device_count():
    """Return the number of devices. Without a driver or device, raise the CUDA runtime's error."""
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
    """The current device and streams of a thread, as in CuPy."""

    def __init__(self):
        self.device = 0
        self.streams = []  # (device, stream pointer) of active `with` blocks, innermost last
        self.used = {}  # device: pointer of the stream set by Stream.use()


current = _Current()
