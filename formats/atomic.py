"""Atomic file writes: a file is complete, or it does not exist."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

DISK_FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` if the block ends without an exception.

    The data is written to a hidden file in the same folder, which is flushed to disk and then renamed. After an
    exception the hidden file is removed and ``path`` is unchanged. Missing parent folders are created. Raises
    FileExistsError if ``path`` is a folder or a device such as /dev/null, which the rename would replace.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "not a regular file, so it is not replaced", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(_default_mode())
        Path(name).replace(path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        if isinstance(error, OSError) and error.errno in DISK_FULL_ERRORS and error.filename is None:
            error.filename = str(path)  # an error from write() does not name the file
        raise
    _sync_folder(path.parent)


def _default_mode() -> int:
    """Return the permission bits of a file created with ``open`` (mkstemp uses 0o600)."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make the rename durable if the system supports it.

    Errors are ignored: Windows cannot open folders, some network file systems cannot flush them, and the file has
    already been renamed.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
