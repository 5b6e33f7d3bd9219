"""Read documents from text files and split them into pieces that are encoded independently.

Each document is preceded by end-of-text when it is encoded. Files are streamed, so their size is not limited by memory:
a long document is split into pieces of about ``PIECE_SIZE`` characters, before a single space between two other
characters. GPT-2's pattern starts a new word there anyway, so the ids equal those of the unsplit document. Text without
such a space within a piece is split before a line break or, if there is none, at any character.
"""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.tokenizer.base import END_OF_TEXT

PIECE_SIZE = 1 << 18  # characters of a piece; also the bytes read at once from a .txt file
MAX_LINE_BYTES = 1 << 28  # of a .jsonl file; each line is held in memory
REPORT_BYTES = 1 << 20  # between two progress reports
SEPARATOR = END_OF_TEXT.encode()  # alone on a line of a .txt file, it ends a document
STDIN = "-"


@dataclass(frozen=True)
class Piece:
    """A text that is encoded independently. End-of-text is put before it if ``starts_document``."""

    text: str
    starts_document: bool


def check_files(paths: Sequence[str]) -> None:
    """Raise UsageError, MissingError or OSError for the first path that is not a readable file of a supported type."""
    for path in paths:
        suffix = Path(path).suffix.lower()
        if path == STDIN:
            continue
        if suffix == ".parquet":
            raise MissingError(f"{path}: .parquet files are not implemented yet; convert it to .txt or .jsonl")
        if suffix not in (".txt", ".jsonl"):
            found = suffix or "no file extension"
            raise UsageError(f"{path}: found {found}, expected .txt or .jsonl, or - for text from stdin")
        if not Path(path).is_fifo():  # opening a named pipe would consume its input
            with Path(path).open("rb"):
                pass


def input_bytes(paths: Sequence[str]) -> int | None:
    """Return the total size of the files, or None if one of them is a stream."""
    sizes = [Path(path).stat().st_size if Path(path).is_file() else None for path in paths]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def read_documents(
    paths: Sequence[str], stdin: BinaryIO, on_progress: Callable[[int], None] = lambda bytes_read: None
) -> Iterator[Piece]:
    """Yield the documents of ``.txt`` and ``.jsonl`` files, and of ``stdin`` for ``-``, which is read as ``.txt``.

    ``on_progress`` is called with the number of bytes read so far. Raises DataError for text that is not UTF-8 and for
    lines of a ``.jsonl`` file that are not JSON objects with a string under "text".
    """
    bytes_read = 0
    for path in paths:
        if path == STDIN:
            reader = _Reader(stdin, bytes_read, on_progress)
            yield from _read_text(reader, "stdin")
        else:
            read = _read_jsonl if path.lower().endswith(".jsonl") else _read_text
            with Path(path).open("rb") as file:
                reader = _Reader(file, bytes_read, on_progress)
                yield from read(reader, path)
        bytes_read = reader.bytes_read


class _Reader:
    """A file reader that counts bytes and reports progress about every REPORT_BYTES."""

    def __init__(self, file: BinaryIO, bytes_read: int, on_progress: Callable[[int], None]) -> None:
        self._file, self.bytes_read, self._on_progress = file, bytes_read, on_progress
        self._reported = bytes_read

    def read_lines(self, size: int) -> bytes:
        """Return ``size`` bytes, extended to the end of the last line by at most ``size`` further bytes."""
        return self._count(self._file.read(size) + self._file.readline(size))

    def read_line(self, limit: int) -> bytes:
        return self._count(self._file.readline(limit))

    def _count(self, content: bytes) -> bytes:
        self.bytes_read += len(content)
        if self.bytes_read - self._reported >= REPORT_BYTES:
            self._reported = self.bytes_read
            self._on_progress(self.bytes_read)
        return content


def _read_text(file: _Reader, name: str) -> Iterator[Piece]:
    """Yield the documents of a text file, which are separated by lines that contain only ``<|endoftext|>``.

    The separator lines, a byte order mark at the start, and documents of only whitespace are dropped. All other text
    is unchanged.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")()
    splitter = _Splitter()
    position = 0
    at_line_start = True
    while block := file.read_lines(PIECE_SIZE):
        if position == 0 and block.startswith(codecs.BOM_UTF8):
            position = len(codecs.BOM_UTF8)
            block = block[position:]
        # Splitting into lines is slow, so it is done only for blocks that contain a separator.
        for lines in block.splitlines(keepends=True) if SEPARATOR in block else [block]:
            if at_line_start and lines.rstrip(b"\r\n") == SEPARATOR:
                yield from splitter.end()
            else:
                try:
                    text = utf8.decode(lines)
                except UnicodeDecodeError as error:
                    raise _invalid_utf8(name, position - len(utf8.getstate()[0]) + error.start) from None
                yield from splitter.add(text)
            position += len(lines)
            at_line_start = lines.endswith(b"\n")
    if incomplete := utf8.getstate()[0]:
        raise _invalid_utf8(name, position - len(incomplete))
    yield from splitter.end()


def _read_jsonl(file: _Reader, name: str) -> Iterator[Piece]:
    """Yield one document per line: the string under "text". Empty lines and blank texts are skipped."""
    number = 0
    start = 0
    while line := file.read_line(MAX_LINE_BYTES + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{where}: longer than {MAX_LINE_BYTES >> 20} MiB; expected one document per line")
        text = decode_utf8(line, where, start)
        start += len(line)
        if not text.strip("\ufeff \t\r\n"):
            continue
        try:
            content = json.loads(text.removeprefix("\ufeff") if number == 1 else text)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{where}: invalid JSON ({error}); expected an object with a string under "text"') from None
        document = content.get("text") if isinstance(content, dict) else None
        if not isinstance(document, str):
            raise DataError(f'{where}: expected an object with a string under "text"')
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: found an unpaired surrogate ({error.object[error.start]!a}) in the text, expected valid "
                "Unicode"
            ) from None
        splitter = _Splitter()
        yield from splitter.add(document)
        yield from splitter.end()


class _Splitter:
    """Splits the text of documents into pieces."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._starts_document = True

    def add(self, text: str) -> Iterator[Piece]:
        """Add text to the document and yield the pieces it completes. Fewer than two pieces stay buffered."""
        self._parts.append(text)
        self._length += len(text)
        if self._length < 2 * PIECE_SIZE:
            return
        text = "".join(self._parts)
        start = 0
        while len(text) - start >= 2 * PIECE_SIZE:
            end = split_point(text, start, start + PIECE_SIZE)
            yield self._piece(text[start:end])
            start = end
        self._parts, self._length = [text[start:]], len(text) - start

    def end(self) -> Iterator[Piece]:
        """Yield the rest of the document. Text added later belongs to a new document."""
        text = "".join(self._parts)
        if text and not (self._starts_document and text.isspace()):
            yield self._piece(text)
        self._parts, self._length, self._starts_document = [], 0, True

    def _piece(self, text: str) -> Piece:
        piece = Piece(text, self._starts_document)
        self._starts_document = False
        return piece


def split_point(text: str, start: int, limit: int) -> int:
    """Return the index at which to split ``text``, which extends beyond ``limit``.

    The index is the last one between ``start`` and ``limit`` that the module docstring allows, else ``limit``.
    """
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


def decode_utf8(content: bytes, name: str, offset: int = 0) -> str:
    """Decode ``content``, which begins at byte ``offset`` of ``name``. Raises DataError if it is not UTF-8."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _invalid_utf8(name, offset + error.start) from None


def _invalid_utf8(name: str, position: int) -> DataError:
    return DataError(f"{name}: not UTF-8 at byte {position:,}; convert it, e.g. with `iconv -t utf-8`")
