"""How much memory this process holds, as far as the system says."""

import os
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_memory() -> int | None:
    """Bytes held now; None where the system does not say."""
    return _linux("VmRSS:") if STATUS.exists() else peak_memory()


def peak_memory() -> int | None:
    """Bytes held at most so far; None where the system does not say.

    Linux: VmHWM, since getrusage's ru_maxrss there begins with what the parent process held. Elsewhere ru_maxrss, which
    macOS gives in bytes and the BSDs in KiB.
    """
    if STATUS.exists():
        return _linux("VmHWM:")
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _linux(field: str) -> int | None:
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def installed_memory() -> int | None:
    """Bytes of this machine's memory. Windows has no such call, and refuses an allocation itself."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
