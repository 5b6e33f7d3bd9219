"""The folder for downloads and compiled kernels."""

import errno
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$LLMC_CACHE``, else ``$XDG_CACHE_HOME/llmc``, else ``~/.cache/llmc``.

    Raises FileNotFoundError if the user has no home folder, as in some containers.
    """
    if folder := os.environ.get("LLMC_CACHE"):
        return Path(folder)
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder) / "llmc"
    try:
        return Path.home() / ".cache" / "llmc"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "no home folder for the cache; set LLMC_CACHE to a folder") from None
