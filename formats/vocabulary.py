"""The tokenizer table: the bytes of each token."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.errors import RangeError, SizeError, VersionError
from llmc_cli.formats.header import HEADER_BYTES, TRUNCATED_REMEDY, check_range, new_slots, read_slots
from llmc_cli.formats.registry import FORMATS, Kind

GPT2_END_OF_TEXT = 50256
"""The end-of-text id of version 1, whose header does not contain it."""


class Vocabulary(NamedTuple):
    tokens: list[bytes]  # indexed by token id
    end_of_text: int
    version: int


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read a tokenizer table of version 1 or 2. Raises MagicError, VersionError, RangeError and SizeError."""
    slots = read_slots(path, Kind.VOCABULARY)
    version, count = int(slots[1]), int(slots[2])
    end_of_text = GPT2_END_OF_TEXT if version == 1 else int(slots[3])
    size = Path(path).stat().st_size
    check_range(path, "number of tokens", count, 1)
    check_range(path, "end-of-text id", end_of_text, 0, count - 1)
    low, high = HEADER_BYTES + count, HEADER_BYTES + 256 * count
    if not low <= size <= high:
        raise SizeError(path, f"a file size of {size:,} bytes", f"{low:,} to {high:,} bytes for {count:,} tokens")
    body = Path(path).read_bytes()[HEADER_BYTES:]
    tokens: list[bytes] = []
    start = 0
    for token in range(count):
        end = start + 1 + body[start] if start < len(body) else len(body) + 1
        if end > len(body):
            raise SizeError(path, f"the end of the file in token {token:,}", f"{count:,} tokens", TRUNCATED_REMEDY)
        tokens.append(body[start + 1 : end])
        start = end
    if start != len(body):
        raise SizeError(path, f"{len(body) - start:,} bytes after the last token", "the end of the file")
    return Vocabulary(tokens, end_of_text, version)


def write_vocabulary(path: str | Path, tokens: Sequence[bytes], end_of_text: int, version: int = 2) -> None:
    """Write a tokenizer table.

    Raises RangeError for a token of more than 255 bytes, an end-of-text id that is not the id of a token, and, in
    version 1, an end-of-text id other than 50256, which that version cannot store.
    """
    if version not in FORMATS[Kind.VOCABULARY].versions:
        raise VersionError(path, f"version {version} requested", "version 1 or 2 of the tokenizer table format")
    check_range(path, "end-of-text id", end_of_text, 0, len(tokens) - 1)
    if version == 1 and end_of_text != GPT2_END_OF_TEXT:
        raise RangeError(path, f"end-of-text id = {end_of_text}", f"{GPT2_END_OF_TEXT} in version 1", "use version 2")
    for token, content in enumerate(tokens):
        check_range(path, f"length of token {token:,} in bytes", len(content), 0, 255)
    slots = new_slots(Kind.VOCABULARY, version)
    slots[2] = len(tokens)
    slots[3] = end_of_text if version == 2 else 0
    with atomic_write(path) as file:
        file.write(slots.data)
        file.write(b"".join(bytes([len(content)]) + content for content in tokens))
