"""--device, --precision and --threads become a backend. What cannot be had is an error; nothing falls back silently."""

import math
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.kernels.spec import Kernels

PRECISIONS = ("auto", "fp32", "tf32", "bf16")


@dataclass(frozen=True)
class Backend:
    """Kernels ready to run, and what they run on in words."""

    kernels: Kernels
    device: str  # "cpu"
    precision: str  # "fp32"
    threads: int
    description: str  # processor, threads, BLAS
    why: str  # what "auto" chose and for what reason; empty where nothing was left to choose


def open_kernels(
    device: str, precision: str, threads: int | None, on_compile: Callable[[str], None] | None = None
) -> Backend:
    """The backend for these options; ``threads`` None takes the cores that this process may use.

    ``on_compile`` is told before a wait for the compiler. Raises UsageError for a name that is none, MissingError for
    what this machine or version has not.
    """
    if device not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if precision not in PRECISIONS:
        raise UsageError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: expected at least 1")
    if device.startswith("cuda"):
        raise MissingError(f"--device {device}: CUDA is not supported yet; use --device cpu")
    if precision in ("tf32", "bf16"):
        raise MissingError(f"--precision {precision}: not supported on the CPU yet; use --precision fp32")
    why = []
    if device == "auto":
        why.append("cpu: the only device supported yet")
    if precision == "auto":
        why.append("fp32: the only precision supported on the CPU yet")
    return _open_cpu(threads or available_cores(), "; ".join(why), on_compile)


def _open_cpu(threads: int, why: str, on_compile: Callable[[str], None] | None) -> Backend:
    _allow_threads(threads)
    from llmc_cli.kernels.cpu.cache import load_kernels

    kernels = load_kernels(on_compile)(threads)
    description = f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}, {kernels.blas_name()}"
    return Backend(kernels, "cpu", "fp32", threads, description, why)


def _allow_threads(threads: int) -> None:
    """Import numba so that its pool can have ``threads``. The pool has one for each core unless an environment variable
    says otherwise at that moment; where more are asked for it is set, and stays, since numba looks at it again.

    Raises MissingError where numba has been imported with less.
    """
    if threads > available_cores() and "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
    import numba

    most: int = vars(numba.config)["NUMBA_NUM_THREADS"]
    if threads > most:
        raise MissingError(
            f"--threads {threads}: numba has been started with {most}; "
            f"set NUMBA_NUM_THREADS={threads} in the environment"
        )


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
