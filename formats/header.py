"""The header of llm.c's files: 256 int32 slots, 1,024 bytes. Only headerless token files have none."""

from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.errors import MagicError, RangeError, SizeError, VersionError
from llmc_cli.formats.registry import BIG_ENDIAN_REMEDY, FORMATS, Kind, describe_kind, describe_start

HEADER_SLOTS = 256
HEADER_BYTES = 4 * HEADER_SLOTS

TRUNCATED_REMEDY = "the file is truncated: download or write it again"

Slots: TypeAlias = NDArray[np.int32]
"""Array of 256 int32, little-endian on every machine."""


def read_slots(path: str | Path, kind: Kind) -> Slots:
    """Read the header of a file and check that its magic number and version are those of ``kind``.

    Raises MagicError, VersionError, and SizeError if the file is shorter than the header.
    """
    entry = FORMATS[kind]
    with Path(path).open("rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) >= 4 and int.from_bytes(start[:4], "little") != entry.magic:
        remedy = "" if int.from_bytes(start[:4], "big") != entry.magic else BIG_ENDIAN_REMEDY
        raise MagicError(path, describe_start(start), describe_kind(kind, entry.magic), remedy)
    if len(start) < HEADER_BYTES:
        raise SizeError(
            path,
            f"a file size of {len(start)} bytes",
            f"at least the {HEADER_BYTES} bytes of the header",
            TRUNCATED_REMEDY,
        )
    slots = np.frombuffer(start, "<i4")
    version = int(slots[1])
    if version not in entry.versions:
        known = ("version " if len(entry.versions) == 1 else "one of versions ") + ", ".join(map(str, entry.versions))
        raise VersionError(path, f"version {version} of the {kind.value} format", known)
    return slots


def new_slots(kind: Kind, version: int) -> Slots:
    """Return a header with its magic number and version set and all other slots zero."""
    slots = np.zeros(HEADER_SLOTS, "<i4")
    slots[:2] = FORMATS[kind].magic, version
    return slots


def get_uint64(slots: Slots, slot: int) -> int:
    """Return the uint64 stored in ``slot`` (an even number) and the slot after it."""
    return int(slots[slot : slot + 2].view("<u8")[0])


def set_uint64(slots: Slots, slot: int, value: int) -> None:
    """Store a uint64 in ``slot`` (an even number) and the slot after it."""
    slots[slot : slot + 2].view("<u8")[0] = value


def check_size(path: str | Path, expected: int, content: str) -> None:
    """Raise SizeError unless the file has exactly ``expected`` bytes; ``content`` describes what takes that size."""
    found = Path(path).stat().st_size
    if found != expected:
        remedy = TRUNCATED_REMEDY if found < expected else "the file has extra bytes at the end"
        raise SizeError(path, f"a file size of {found:,} bytes", f"{expected:,} bytes for {content}", remedy)


def check_range(path: str | Path, name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise RangeError unless low <= value <= high. Without ``high`` there is no upper bound."""
    if value < low or (high is not None and value > high):
        bounds = f"at least {low:,}" if high is None else f"{low:,} to {high:,}"
        raise RangeError(path, f"{name} = {value:,}", bounds)
