"""The header of 256 int32 slots, 1,024 bytes, that every llm.c file but the headerless one begins with."""

from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.errors import MagicError, RangeError, SizeError, VersionError
from llmc_cli.formats.registry import FORMATS, Kind, describe_start

HEADER_SLOTS = 256
HEADER_BYTES = 4 * HEADER_SLOTS

Slots: TypeAlias = NDArray[np.int32]
"""(256,) int32, little-endian on every machine."""


def read_slots(path: str | Path, kind: Kind) -> Slots:
    """The slots of a file that must be of ``kind``; nothing but the header is read.

    Raises MagicError, VersionError, and SizeError where the file ends before its header does.
    """
    entry = FORMATS[kind]
    with Path(path).open("rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) >= 4 and int.from_bytes(start[:4], "little") != entry.magic:
        remedy = "" if int.from_bytes(start[:4], "big") != entry.magic else "its bytes are in reverse order"
        raise MagicError(path, describe_start(start), f"magic {entry.magic} ({kind.value})", remedy)
    if len(start) < HEADER_BYTES:
        raise SizeError(path, f"{len(start)} bytes", f"at least the {HEADER_BYTES} of the header", "it is cut off")
    slots = np.frombuffer(start, "<i4")
    version = int(slots[1])
    if version not in entry.versions:
        known = ", ".join(map(str, entry.versions))
        raise VersionError(path, f"version {version} of a {kind.value}", f"version {known}")
    return slots


def new_slots(kind: Kind, version: int) -> Slots:
    """Zeroed slots with magic and version set."""
    slots = np.zeros(HEADER_SLOTS, "<i4")
    slots[:2] = FORMATS[kind].magic, version
    return slots


def get_uint64(slots: Slots, slot: int) -> int:
    """The 64-bit number that takes ``slot`` (even) and the next one."""
    return int(slots[slot : slot + 2].view("<u8")[0])


def set_uint64(slots: Slots, slot: int, value: int) -> None:
    """Put a 64-bit number into ``slot`` (even) and the next one."""
    slots[slot : slot + 2].view("<u8")[0] = value


def check_size(path: str | Path, expected: int, why: str) -> None:
    """Raise SizeError unless the file has exactly ``expected`` bytes; ``why`` says what asks for them."""
    found = Path(path).stat().st_size
    if found != expected:
        remedy = "it is cut off: fetch or write it anew" if found < expected else "there is more than belongs to it"
        raise SizeError(path, f"{found:,} bytes", f"{expected:,} ({why})", remedy)


def check_range(path: str | Path, name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise RangeError unless low <= value, and value <= high where one is given."""
    if value < low or (high is not None and value > high):
        bounds = f"at least {low:,}" if high is None else f"{low:,} to {high:,}"
        raise RangeError(path, f"{name} {value:,}", bounds)
