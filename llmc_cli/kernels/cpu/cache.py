"""Where compiled kernels are kept, and how they get there once.

Numba's own cache crashes when two processes fill it at the same time, does not notice edits in imported modules, and
fails where the package is installed read-only. So the kernels live in a folder of ours whose name says what they were
compiled from and for, filled by one process at a time, and complete only when a marker file stands in it.
"""

import contextlib
import hashlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import llvmlite
import numba

from llmc_cli.kernels.cpu import compiling

if TYPE_CHECKING:
    from llmc_cli.kernels.cpu.kernels import CpuKernels

SETTINGS: Any = numba.config  # made of the environment, so no type checker knows what is in it

KERNELS = "llmc_cli.kernels.cpu.kernels"
MARKER = "complete"
KEPT_VERSIONS = 4
SPACE = 32 << 20  # bytes: several times what the kernels take


def cache_root() -> Path:
    """``LLMC_CACHE``, else ``XDG_CACHE_HOME/llmc``, else ``~/.cache/llmc``; may not exist yet."""
    if named := os.environ.get("LLMC_CACHE"):
        return Path(named)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "llmc"
    return Path.home() / ".cache" / "llmc"


def version() -> str:
    """A hash of everything that compiled kernels depend on: their sources, the compiler, Python and the processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        stat = source.stat()
        # Numba refuses what was compiled from a file of another place or time, so these belong to the version
        digest.update(f"{source} {stat.st_mtime_ns} {stat.st_size}\n".encode())
        digest.update(source.read_bytes())
    digest.update(f"{numba.__version__} {llvmlite.__version__} {sys.implementation.cache_tag}".encode())
    digest.update(f"{compiling.target()} {SETTINGS.OPT}".encode())
    return digest.hexdigest()[:16]


def kernel_folder() -> Path:
    """The folder of this version's kernels; may not exist yet."""
    return cache_root() / "kernels" / version()


def is_warm() -> bool:
    """Whether loading the kernels needs no compiling."""
    return KERNELS in sys.modules or _is_complete(kernel_folder())


def load_kernels(on_compile: Callable[[str], None] | None = None) -> "type[CpuKernels]":
    """The class of the CPU's kernels, compiled or loaded from the cache.

    Before a wait for the compiler, or for another process that is compiling, ``on_compile`` is told what is coming.
    Where the cache cannot be written the kernels are compiled for this process only.
    """
    if KERNELS not in sys.modules:
        folder = kernel_folder()
        if on_compile is not None and not _is_complete(folder):
            on_compile("compiling kernels, once, about 20 s")
        try:
            if _is_complete(folder):
                _import_kernels(folder)
            else:
                _fill(folder)
        except OSError:  # no such place, read-only, full
            _import_kernels(None)
    loaded: type[CpuKernels] = importlib.import_module(KERNELS).CpuKernels
    return loaded


def _is_complete(folder: Path) -> bool:
    """Whether all kernels are there and can be used: numba reads only from folders that it could write to."""
    return (folder / MARKER).exists() and os.access(folder, os.W_OK)


def _fill(folder: Path) -> None:
    """Import the kernels into ``folder``, one process at a time. Raises OSError where there is no room for them."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < SPACE:
        raise OSError(f"{folder}: less than {SPACE >> 20} MiB free")
    with filelock.FileLock(folder.with_suffix(".lock")):
        _import_kernels(folder)
        (folder / MARKER).touch()
        _remove_old_versions(folder)


def _import_kernels(folder: Path | None) -> None:
    """Import the kernels' modules with numba's cache at ``folder``, or with none; numba's setting is put back. Raises
    OSError where the folder cannot be used."""
    kept = SETTINGS.CACHE_DIR
    compiling.caching = folder is not None
    SETTINGS.CACHE_DIR = str(folder or "")
    try:
        importlib.import_module(KERNELS)
    except RuntimeError as error:
        if "cannot cache function" in str(error):  # numba's way to say that it cannot write there
            raise OSError(f"{folder}: {error}") from error
        raise
    finally:
        SETTINGS.CACHE_DIR = kept


def _remove_old_versions(folder: Path) -> None:
    """Keep the newest versions only. One in use loses nothing: it is in memory, and compiled again when needed."""
    versions = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
    versions.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in versions[KEPT_VERSIONS - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.with_suffix(".lock").unlink()
