"""Where compiled kernels are kept, and how they get there once.

Numba's own cache crashes when two processes fill it at the same time, does not notice edits in imported modules, and
fails where the package is installed read-only. So the kernels live in a folder of ours whose name says what they were
compiled from and for, filled by one process at a time. They come in groups, each compiled when it is first asked for,
and complete only when its marker file stands in the folder.
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
from llmc_cli.machine.cache_folder import cache_folder

if TYPE_CHECKING:
    pass

SETTINGS: Any = numba.config  # made of the environment, so no type checker knows what is in it

KERNELS = "llmc_cli.kernels.cpu.kernels"
DECODING = "llmc_cli.kernels.cpu.sampling"
TILES = "llmc_cli.kernels.cpu.amx.matmul"
TILE_ATTENTION = "llmc_cli.kernels.cpu.amx.attention"
ATTENTION = "llmc_cli.kernels.cpu.attention"
CACHED_ATTENTION = "llmc_cli.kernels.cpu.cached_attention"
ROUNDED = "llmc_cli.kernels.cpu.rounded_matmul"
MARKERS = {
    KERNELS: "complete",
    DECODING: "complete-decoding",
    ATTENTION: "complete-attention",
    CACHED_ATTENTION: "complete-cached-attention",
    TILES: "complete-tiles",
    TILE_ATTENTION: "complete-tile-attention",
    ROUNDED: "complete-rounded",
}
"""Groups of kernels: the module that imports all of one, and its marker; tiles have one for each number of parts."""

KEPT_VERSIONS = 4
SPACE = 32 << 20  # bytes: several times what the kernels take

_loaded: set[str] = set()
"""The markers of what this process has loaded."""


def version() -> str:
    """A hash of everything that compiled kernels depend on: their sources, the compiler, Python and the processor."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        stat = source.stat()
        # Numba refuses what was compiled from a file of another place or time, so these belong to the version
        digest.update(f"{source} {stat.st_mtime_ns} {stat.st_size}\n".encode())
        digest.update(source.read_bytes())
    digest.update(f"{numba.__version__} {llvmlite.__version__} {sys.implementation.cache_tag}".encode())
    digest.update(f"{compiling.target()} {SETTINGS.OPT}".encode())
    return digest.hexdigest()[:16]


def kernel_folder() -> Path:
    """The folder of this version's kernels; may not exist yet. FileNotFoundError where there is no place for it."""
    return cache_folder() / "kernels" / version()


def is_warm(group: str = KERNELS) -> bool:
    """Whether loading a group of kernels needs no compiling."""
    return MARKERS[group] in _loaded or _is_complete(MARKERS[group])


def _load(group: str, on_compile: Callable[[str], None] | None, told: str, parts: int = 0) -> None:
    """Import a group of kernels, and where it has ``parts`` compile it for them, with the cache if that is possible."""
    marker = f"{MARKERS[group]}-{parts}" if parts else MARKERS[group]
    if marker in _loaded:
        return
    complete = _is_complete(marker)
    if on_compile is not None and not complete:
        on_compile(told)
    try:
        if complete:
            _import(group, parts, kernel_folder())
        else:
            _fill(group, parts, kernel_folder(), marker)
    except (OSError, NotImplementedError):  # no such place, read-only, full; a file system without locks
        _import(group, parts, None)
    _loaded.add(marker)


def _is_complete(marker: str) -> bool:
    """Whether all kernels are there and can be used: numba reads only from folders that it could write to."""
    try:
        folder = kernel_folder()
        return (folder / marker).exists() and os.access(folder, os.W_OK)
    except OSError:  # no home folder, or one that is not ours to look into
        return False


def _fill(group: str, parts: int, folder: Path, marker: str) -> None:
    """Import a group of kernels into ``folder``, one process at a time. Raises OSError where there is no room."""
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < SPACE:
        raise OSError(f"{folder}: less than {SPACE >> 20} MiB free")
    with filelock.FileLock(folder.with_suffix(".lock")):
        _import(group, parts, folder)
        (folder / marker).touch()
        _remove_old_versions(folder)


def _import(group: str, parts: int, folder: Path | None) -> None:
    """Import a group of kernels with numba's cache at ``folder``, or with none; numba's setting is put back. Raises
    OSError where the folder cannot be used."""
    kept = SETTINGS.CACHE_DIR
    compiling.caching = folder is not None
    SETTINGS.CACHE_DIR = str(folder or "")
    try:
        module = importlib.import_module(group)
        if parts:
            module.compile_product(parts)
    except (OSError, RuntimeError) as error:
        sys.modules.pop(group, None)  # its functions would try that folder again
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
