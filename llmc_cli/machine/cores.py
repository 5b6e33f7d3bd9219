"""The processor: its name, and the cores that this process may use."""

import math
import os
import platform
from pathlib import Path


def usual_threads() -> int:
    """The cores that this process may use, but no more threads than the user has let numba start with."""
    cores = available_cores()
    most = os.environ.get("NUMBA_NUM_THREADS", "")
    return max(1, min(cores, int(most))) if most.isdecimal() else cores


def available_cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group rounded up; at least 1."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13: affinity, and PYTHON_CPU_COUNT
        cores = os.process_cpu_count()
    elif hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    return max(1, math.ceil(min(cores or 1, cpu_quota())))


def cpu_quota(cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> float:
    """Cores' worth of time that the control groups of this process allow, infinity where there is no limit.

    ``process`` lists the groups, a line ``id:controllers:path`` each; a limit of any group above counts too. Inside a
    container the path may name what is not visible there: then the root is the container's own group.
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
    """The limit of one control group, of version 2 (``cpu.max``: quota and period) or 1 (a file for each)."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such file; "max" for no limit
        return math.inf


def processor_name() -> str:
    """The processor's model, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()
