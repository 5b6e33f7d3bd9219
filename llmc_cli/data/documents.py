"""Where documents come from, and how they are cut into pieces that can be encoded one by one.

A document is text that the model is to see as a whole; end-of-text comes before each. Files are read as a stream, so
their size does not matter: a long document is cut into pieces of about ``PIECE`` characters, before a single space
between two other characters. That is where GPT-2's pattern begins a new word anyway, so the ids are those of the whole
document. Only text without such a space for a whole piece is cut before a line break, and without one, anywhere.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmc_cli.errors import DataError, MissingError, UsageError

PIECE = 1 << 18  # characters
LINE_LIMIT = 1 << 28  # bytes of one line of a .jsonl file, which must be in memory as a whole
REPORT_EVERY = 1 << 20  # bytes
SEPARATOR = b"<|endoftext|>"  # on a line of its own in a .txt file it ends a document


STDIN = "-"


@dataclass(frozen=True)
class Piece:
    """Text to encode on its own. ``starts``: a document begins here, so end-of-text comes before it."""

    text: str
    starts: bool


def check_files(paths: Sequence[str]) -> None:
    """Raise UsageError, MissingError or OSError for the first path that is no file of a known kind that can be read."""
    for path in paths:
        suffix = Path(path).suffix.lower()
        if path == STDIN:
            continue
        if suffix == ".parquet":
            raise MissingError(f"{path}: .parquet files: not yet; give .txt or .jsonl")
        if suffix not in (".txt", ".jsonl"):
            found = suffix or "no ending"
            raise UsageError(f"{path}: found {found}, expected .txt or .jsonl, or - for text from stdin")
        if not Path(path).is_fifo():  # opening would be reading
            with Path(path).open("rb"):
                pass


def input_bytes(paths: Sequence[str]) -> int | None:
    """The size of all files together; None where one is a stream."""
    sizes = [Path(path).stat().st_size if Path(path).is_file() else None for path in paths]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def read_documents(
    paths: Sequence[str], stdin: BinaryIO, on_bytes: Callable[[int], None] = lambda done: None
) -> Iterator[Piece]:
    """The documents of ``.txt`` and ``.jsonl`` files and of ``-``, which is ``stdin`` read like a ``.txt``.

    ``on_bytes`` takes the bytes read so far. Raises DataError for what is not UTF-8 or not JSON with a text.
    """
    done = 0
    for path in paths:
        if path == STDIN:
            counted = _Counted(stdin, done, on_bytes)
            yield from _plain(counted, "stdin")
        else:
            read = _json_lines if path.lower().endswith(".jsonl") else _plain
            with Path(path).open("rb") as file:
                counted = _Counted(file, done, on_bytes)
                yield from read(counted, path)
        done = counted.done


class _Counted:
    """A file that counts what is read of it; ``on_bytes`` hears of it now and then."""

    def __init__(self, file: BinaryIO, done: int, on_bytes: Callable[[int], None]) -> None:
        self._file, self.done, self._on_bytes = file, done, on_bytes
        self._told = done

    def read_lines(self, size: int) -> bytes:
        """``size`` bytes and the rest of the line they end in, or up to as many again."""
        return self._count(self._file.read(size) + self._file.readline(size))

    def read_line(self, limit: int) -> bytes:
        return self._count(self._file.readline(limit))

    def _count(self, content: bytes) -> bytes:
        self.done += len(content)
        if self.done - self._told >= REPORT_EVERY:
            self._told = self.done
            self._on_bytes(self.done)
        return content


def _plain(file: _Counted, name: str) -> Iterator[Piece]:
    """A text file: one document, or several where lines that hold only ``<|endoftext|>`` separate them.

    The separating lines are left out, everything else is kept as it is, but for a byte order mark at the start.
    Documents of white space only are left out too.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    document = _Document()
    position = 0
    fresh = True  # the next bytes are the start of a line
    while block := file.read_lines(PIECE):
        if position == 0 and block.startswith(codecs.BOM_UTF8):
            position = len(codecs.BOM_UTF8)
            block = block[position:]
        # Line by line is slow, and only needed where a separator is near.
        for lines in block.splitlines(keepends=True) if SEPARATOR in block else [block]:
            if fresh and lines.rstrip(b"\r\n") == SEPARATOR:
                yield from document.end()
            else:
                try:
                    text = utf8.decode(lines)
                except UnicodeDecodeError as error:
                    raise _not_utf8(name, position - len(utf8.getstate()[0]) + error.start) from None
                yield from document.add(text)
            position += len(lines)
            fresh = lines.endswith(b"\n")
    if unfinished := utf8.getstate()[0]:
        raise _not_utf8(name, position - len(unfinished))
    yield from document.end()


def _json_lines(file: _Counted, name: str) -> Iterator[Piece]:
    """A document a line: the string under "text". Empty lines, and texts of white space only, are left out."""
    number = 0
    start = 0
    while line := file.read_line(LINE_LIMIT + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > LINE_LIMIT:
            raise DataError(f"{where}: found more than {LINE_LIMIT >> 20} MiB, expected a document a line")
        text = _decode(line, where, start)
        start += len(line)
        if not text.strip("\ufeff \t\r\n"):
            continue
        try:
            content = json.loads(text.removeprefix("\ufeff") if number == 1 else text)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{where}: found no JSON ({error}), expected an object with a text under "text"') from None
        document = content.get("text") if isinstance(content, dict) else None
        if not isinstance(document, str):
            raise DataError(f'{where}: found no string under "text", expected one on each line')
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: found half a surrogate pair ({error.object[error.start]!a}) in the text"
            ) from None
        pieces = _Document()
        yield from pieces.add(document)
        yield from pieces.end()


class _Document:
    """A document on its way: text comes in, pieces go out."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._starts = True

    def add(self, text: str) -> Iterator[Piece]:
        """The pieces that can be cut off now; what stays is shorter than two pieces."""
        self._parts.append(text)
        self._length += len(text)
        if self._length < 2 * PIECE:
            return
        text = "".join(self._parts)
        start = 0
        while len(text) - start >= 2 * PIECE:
            end = cut_before(text, start, start + PIECE)
            yield self._piece(text[start:end])
            start = end
        self._parts, self._length = [text[start:]], len(text) - start

    def end(self) -> Iterator[Piece]:
        """The rest of the document; the next text begins another."""
        text = "".join(self._parts)
        if text and not (self._starts and text.isspace()):
            yield self._piece(text)
        self._parts, self._length, self._starts = [], 0, True

    def _piece(self, text: str) -> Piece:
        piece = Piece(text, self._starts)
        self._starts = False
        return piece


def cut_before(text: str, start: int, limit: int) -> int:
    """Where to cut ``text``, which goes on behind ``limit``: between ``start`` and ``limit`` as the top of this file
    says, or at ``limit``."""
    at = text.rfind(" ", start + 1, limit)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
        at = text.rfind(" ", start + 1, at)
    at = text.rfind("\n", start + 1, limit)
    while at > 0:
        if not text[at - 1].isspace():
            return at
        at = text.rfind("\n", start + 1, at)
    return limit


def _decode(content: bytes, name: str, position: int = 0) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(name, position + error.start) from None


def _not_utf8(name: str, position: int) -> DataError:
    return DataError(f"{name}: not UTF-8 at byte {position:,}; convert it, e.g. with `iconv -t utf-8`")
