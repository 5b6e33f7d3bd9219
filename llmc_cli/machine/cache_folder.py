"""The folder that holds downloads and compiled kernels."""

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def cache_folder() -> Path:
    """Where downloads and kernels are kept: ``$LLMC_CACHE``, else ``$XDG_CACHE_HOME/llmc``, else ``~/.cache/llmc``.

    FileNotFoundError for a user without a home folder, as in some containers.
    """
    if own := os.environ.get("LLMC_CACHE"):
        return Path(own)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "llmc"
    try:
        return Path.home() / ".cache" / "llmc"
    except RuntimeError:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder to keep files in; set LLMC_CACHE") from None
