"""The on-disk cache of compiled kernels.

Numba's own cache crashes when two processes fill it at the same time, does not notice edits in imported modules, and
fails if the package is installed read-only. So the kernels are stored in a folder of this program, whose name is a hash
of everything that they are compiled from and for, and which one process at a time fills. A group of kernels is complete
when its marker file exists.
"""

import contextlib
import functools
import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import filelock
import llvmlite
import numba

from llmc_cli.kernels.cpu import compiling
from llmc_cli.machine.cache_folder import cache_folder

SETTINGS: Any = numba.config  # its attributes are created at run time, so type checkers do not know them

KEPT_VERSIONS = 4
REQUIRED_SPACE = 32 << 20  # bytes: several times the size of all kernels


@functools.cache
def version() -> str:
    """Return a hash of all that compiled kernels depend on: sources, compiler, Python and processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        stat = source.stat()
        # numba rejects kernels compiled from a file with another path or time stamp
        digest.update(f"{source} {stat.st_mtime_ns} {stat.st_size}\n".encode())
        digest.update(source.read_bytes())
    digest.update(f"{numba.__version__} {llvmlite.__version__} {sys.implementation.cache_tag}".encode())
    digest.update(f"{compiling.target()} {SETTINGS.OPT}".encode())
    return digest.hexdigest()[:16]


def kernel_folder() -> Path:
    """Return the folder for this version's kernels, which may not exist yet.

    Raises FileNotFoundError if there is no cache folder.
    """
    return cache_folder() / "kernels" / version()


def is_complete(marker: str) -> bool:
    """Whether the cache holds a group of kernels and is usable: numba reads only from folders that it can write to."""
    try:
        folder = kernel_folder()
        return (folder / marker).exists() and os.access(folder, os.W_OK)
    except OSError:  # no home folder, or no permission to read it
        return False


def compile_kernels(marker: str) -> None:
    """Load the registered kernels from the cache, or compile them into it.

    ``marker`` is the marker file of their group. If the cache is unusable (read-only, full, no home folder, a file
    system without locks), compile them for this process only.
    """
    try:
        if is_complete(marker):
            compiling.compile_registered(kernel_folder())
        else:
            _fill(kernel_folder(), marker)
    except (OSError, NotImplementedError):
        compiling.compile_registered(None)


def _fill(folder: Path, marker: str) -> None:
    """Compile the registered kernels into ``folder``, one process at a time. Raises OSError if there is no space."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < REQUIRED_SPACE:
        raise OSError(f"{folder}: less than {REQUIRED_SPACE >> 20} MiB free")
    with filelock.FileLock(folder.with_suffix(".lock")):
        compiling.compile_registered(folder)
        (folder / marker).touch()
        _remove_old_versions(folder)


def _remove_old_versions(folder: Path) -> None:
    """Remove all but the newest versions. A process that uses a removed one has its kernels in memory."""
    versions = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    versions.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in versions[KEPT_VERSIONS - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.with_suffix(".lock").unlink()
