"""The Tiny Shakespeare data set: the original text (downloaded) or a similar text that is bundled with llmc."""

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmc_cli.data.documents import Piece, decode_utf8
from llmc_cli.downloads.http import OnProgress, download
from llmc_cli.errors import DataError, MissingError
from llmc_cli.machine.cache_folder import cache_folder

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZE = 1_115_394
"""The original text and its size in bytes."""

AUTO_TIMEOUT_S = 5.0  # short, because ``auto`` falls back to the bundled text


@dataclass(frozen=True)
class ShakespeareText:
    """``origin``: bundled, download, or a path. ``fallback_reason``: why ``auto`` used the bundled text, else empty."""

    text: str
    origin: str
    fallback_reason: str = ""


def shakespeare_text(source: str, on_progress: OnProgress | None = None) -> ShakespeareText:
    """Return the text of Tiny Shakespeare.

    ``source``: ``bundled``, ``download`` for the original, ``auto`` for the original or, if the download fails, the
    bundled text, or the path of a text file. Raises MissingError or DataError if ``download`` fails, OSError or
    DataError for a file that cannot be read or is not UTF-8.
    """
    if source == "bundled":
        return ShakespeareText(_bundled(), "bundled")
    if source == "download":
        return ShakespeareText(_downloaded(on_progress), "download")
    if source != "auto":
        return ShakespeareText(decode_utf8(Path(source).read_bytes(), source), source)
    try:
        return ShakespeareText(_downloaded(on_progress, AUTO_TIMEOUT_S, ()), "download")
    except (MissingError, DataError, OSError) as error:  # OSError: the cache folder is not writable
        return ShakespeareText(_bundled(), "bundled", str(error))


def _bundled() -> str:
    return (importlib.resources.files("llmc_cli.assets") / "shakespeare.txt").read_bytes().decode()


def _downloaded(
    on_progress: OnProgress | None, timeout_s: float = 30.0, retry_delays_s: tuple[float, ...] | None = None
) -> str:
    path = download(URL, cache_folder() / "tinyshakespeare.txt", SHA256, SIZE, on_progress, timeout_s, retry_delays_s)
    return path.read_bytes().decode()


def shakespeare_sections(text: str) -> Iterator[Piece]:
    """Split the text at every empty line; each section is a document.

    As in llm.c, every section except the last keeps its empty line.
    """
    *sections, last = text.split("\n\n")
    for section in sections:
        yield Piece(section + "\n\n", starts_document=True)
    yield Piece(last, starts_document=True)
