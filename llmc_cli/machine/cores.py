"""The processor's name, and the number of cores available to this process."""

import math
import os
import platform
from pathlib import Path


def default_threads() -> int:
    """Return the number of available cores, limited by ``NUMBA_NUM_THREADS`` if the user has set it."""
    cores = available_cores()
    limit = os.environ.get("NUMBA_NUM_THREADS", "")
    return max(1, min(cores, int(limit))) if limit.isdecimal() else cores


def available_cores() -> int:
    """Return the number of cores allowed by CPU affinity and by the cgroup quota, rounded up; at least 1."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13; honors PYTHON_CPU_COUNT
        cores = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    return max(1, math.ceil(min(cores or 1, cpu_quota())))


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """Return the CPU quota of this process's cgroups in cores, infinity if there is none.

    ``process`` has a line ``id:controllers:path`` per cgroup. Limits of parent groups apply too. In a container the
    path may not be visible; the root then is the container's own group.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return math.inf
    quota = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroups / "cpu" if controllers else cgroups
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            quota = min(quota, _group_quota(folder))
            if folder == root:
                break
    return quota


def _group_quota(folder: Path) -> float:
    """Return the quota of one group: ``cpu.max`` (cgroup v2) or ``cpu.cfs_quota_us`` and its period (v1)."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such file, or "max": no limit
        return math.inf


def processor_name() -> str:
    """Return the processor's model name, or its architecture if the name is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
