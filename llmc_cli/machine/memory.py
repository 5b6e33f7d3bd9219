"""Memory of this process and of this machine."""

import os
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_memory() -> int | None:
    """Return the resident memory of this process in bytes (elsewhere than on Linux, its peak); None if unknown."""
    return _status_field("VmRSS:") if STATUS.exists() else peak_memory()


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes; None if unknown.

    Linux: VmHWM, because ``ru_maxrss`` of getrusage starts at the parent process's value there. Elsewhere
    ``ru_maxrss``, in bytes on macOS and in KiB on the BSDs.
    """
    if STATUS.exists():
        return _status_field("VmHWM:")
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status_field(field: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def installed_memory() -> int | None:
    """Return the physical memory of this machine in bytes; None on Windows, which has no sysconf."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
