"""The Tiny Shakespeare text, downloaded or bundled."""

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmc_cli.data.documents import Piece, _decode
from llmc_cli.downloads.http import Progress, download
from llmc_cli.errors import DataError, MissingError
from llmc_cli.machine.cache_folder import cache_folder

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


TINY_SHAKESPEARE_BYTES = 1_115_394


AUTO_TIMEOUT_S = 5.0  # with the bundled text at hand, a network that is not there should not cost minutes


@dataclass(frozen=True)
class ShakespeareText:
    """``origin``: bundled, download or the path; ``shortfall`` says why it is not the original that was wanted."""

    text: str
    origin: str
    shortfall: str = ""


def shakespeare_text(source: str, on_progress: Progress | None = None) -> ShakespeareText:
    """The text for Tiny Shakespeare: ``bundled``, the original by ``download``, a path, or ``auto``, which takes the
    bundled text where the original cannot be had."""
    if source == "bundled":
        return ShakespeareText(_bundled(), "bundled")
    if source == "download":
        return ShakespeareText(_downloaded(on_progress), "download")
    if source != "auto":
        return ShakespeareText(_decode(Path(source).read_bytes(), source), source)
    try:
        return ShakespeareText(_downloaded(on_progress, AUTO_TIMEOUT_S, ()), "download")
    except (MissingError, DataError, OSError) as error:  # OSError: the cache folder cannot be written
        return ShakespeareText(_bundled(), "bundled", str(error))


def _bundled() -> str:
    return (importlib.resources.files("llmc_cli.assets") / "shakespeare.txt").read_bytes().decode()


def _downloaded(
    on_progress: Progress | None, timeout_s: float = 30.0, pauses_s: tuple[float, ...] | None = None
) -> str:
    path = download(
        TINY_SHAKESPEARE_URL,
        cache_folder() / "tinyshakespeare.txt",
        TINY_SHAKESPEARE_SHA256,
        TINY_SHAKESPEARE_BYTES,
        on_progress,
        timeout_s,
        pauses_s,
    )
    return path.read_bytes().decode()


def shakespeare_sections(text: str) -> Iterator[Piece]:
    """The text cut at every empty line; each section is a document, with the empty line put back behind all but the
    last, as the C project does it."""
    *sections, last = text.split("\n\n")
    for section in sections:
        yield Piece(section + "\n\n", starts=True)
    yield Piece(last, starts=True)
