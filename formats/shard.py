"""Token files: shards with a header (uint16 for GPT-2, uint32 for Llama 3), and headerless int32 files."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.errors import RangeError
from llmc_cli.formats.header import HEADER_BYTES, check_range, check_size, new_slots, read_slots
from llmc_cli.formats.registry import FORMATS, KIND_OF_MAGIC, Kind, identify
from llmc_cli.formats.stream import STORED_DTYPES, blocks, check_ids, item_bytes, map_array

MAX_TOKENS = 2**31 - 1
"""The largest token count of a shard, which is stored as an int32."""

SHARDS = (Kind.SHARD_GPT2, Kind.SHARD_LLAMA3)


class ShardHeader(NamedTuple):
    magic: int
    version: int
    num_tokens: int


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard. ``tokens`` (count,) is read-only, uint16 or uint32."""

    path: Path
    kind: Kind
    header: ShardHeader
    tokens: NDArray[Any]

    def check(self, vocab_size: int) -> None:
        """Read the whole file in chunks. Raise RangeError if a token id is not below ``vocab_size``."""
        check_ids(self.path, "tokens", self.tokens, vocab_size)


def read_shard(path: str | Path) -> Shard:
    """Map a shard of either kind. Raises MagicError, VersionError, RangeError and SizeError."""
    with Path(path).open("rb") as file:
        start = file.read(4)
    kind = KIND_OF_MAGIC.get(int.from_bytes(start, "little"))
    if kind is None and len(start) == 4:
        identify(path)  # raises an error with a hint for files of other kinds
    if kind not in SHARDS:
        kind = Kind.SHARD_GPT2
    slots = read_slots(path, kind)
    header = ShardHeader(*(int(slot) for slot in slots[:3]))
    check_range(path, "token count", header.num_tokens, 0)
    dtype = FORMATS[kind].versions[header.version].dtype
    size = HEADER_BYTES + item_bytes(dtype) * header.num_tokens
    check_size(path, size, f"the header and {header.num_tokens:,} tokens")
    return Shard(Path(path), kind, header, map_array(path, dtype, HEADER_BYTES, header.num_tokens))


class ShardWriter:
    """Context manager that writes a token file incrementally.

    The file appears under its name when the block ends, with the final token count in its header. ``kind`` is one of
    SHARDS or Kind.HEADERLESS. ``count`` is the number of tokens written so far.
    """

    def __init__(self, path: str | Path, kind: Kind = Kind.SHARD_GPT2) -> None:
        self.path, self.kind, self.count = Path(path), kind, 0
        self._version = 0 if kind is Kind.HEADERLESS else next(iter(FORMATS[kind].versions))
        dtype = "int32" if kind is Kind.HEADERLESS else FORMATS[kind].versions[self._version].dtype
        self._dtype = np.dtype(STORED_DTYPES[dtype])
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(atomic_write(self.path))
        self._stack.push(self._finish)
        if self.kind is not Kind.HEADERLESS:
            self._file.write(bytes(HEADER_BYTES))
        return self

    def write(self, tokens: ArrayLike) -> None:
        """Append token ids of any integer dtype.

        Raises RangeError for an id that the file's dtype cannot store and for more tokens than a shard can hold.
        """
        ids = np.asarray(tokens)
        if ids.size == 0:
            return
        if ids.dtype.kind not in "iu":
            raise TypeError(f"expected integer token ids, got {ids.dtype}")
        if self.kind is not Kind.HEADERLESS:
            check_range(self.path, "token count", self.count + ids.size, 0, MAX_TOKENS)
        highest = int(np.iinfo(self._dtype).max)
        for block in blocks(ids):
            if int(block.min()) < 0 or int(block.max()) > highest:
                found = int(block.min()) if int(block.min()) < 0 else int(block.max())
                raise RangeError(self.path, f"token id {found}", f"0 to {highest} for {self.kind.phrase}")
            self._file.write(block.astype(self._dtype).data)
        self.count += ids.size

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None and self.kind is not Kind.HEADERLESS:
            slots = new_slots(self.kind, self._version)
            slots[2] = self.count
            self._file.seek(0)
            self._file.write(slots.data)
        return False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def write_shard(path: str | Path, tokens: ArrayLike, kind: Kind = Kind.SHARD_GPT2) -> None:
    """Write ``tokens``, a one-dimensional array of integers, as one file of ``kind``."""
    with ShardWriter(path, kind) as writer:
        writer.write(tokens)
