"""Batches of tokens from shards, in order or shuffled, the same as the C trainer draws them."""

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError
from llmc_cli.formats.header import HEADER_BYTES
from llmc_cli.formats.shard import Shard, read_shard
from llmc_cli.rng import MersenneTwister

SHUFFLE_SEED = 42


@dataclass(frozen=True)
class Position:
    """Where a ``Batches`` stands: enough to go on from there."""

    shard: int
    sample: int  # the next one to read
    shard_order: NDArray[np.int32] | None = None  # these three only where shuffled
    sample_order: NDArray[np.int32] | None = None
    generator: tuple[NDArray[np.uint32], int] | None = None


class _Batch:
    """Memory of one sample, B·T+1 ``tokens``, and views of it."""

    def __init__(self, B: int, T: int) -> None:
        self.tokens = np.zeros(B * T + 1, np.int32)
        self.unsigned = self.tokens.view(np.uint32)
        self.inputs = self.tokens[:-1].reshape(B, T)
        self.targets = self.tokens[1:].reshape(B, T)


class Batches:
    """Samples of B·T+1 tokens from the shards that a glob names, sorted by name; goes round for ever.

    ``next`` gives ``inputs`` and ``targets`` (B,T) int32, the second one position ahead, which stay until it is called
    again, and allocates nothing but at the start of a shard. A sample is one of (tokens - 1) // (B·T) places in its
    shard. Shuffled, the order of shards is permuted at the start and at each epoch, the order of samples in each shard.
    """

    def __init__(
        self, pattern: str, B: int, T: int, vocab_size: int, shuffle: bool = False, seed: int = SHUFFLE_SEED
    ) -> None:
        # a file of this very name, whatever its characters mean in a glob
        self.paths = [Path(pattern)] if Path(pattern).is_file() else [Path(name) for name in sorted(glob.glob(pattern))]
        if not self.paths:
            raise DataError(f"{pattern}: no such file; `llmc prepro` makes token shards")
        self.B, self.T, self.vocab_size, self.shuffle = B, T, vocab_size, shuffle
        self.sizes = [read_shard(path).tokens.size for path in self.paths]  # tokens by shard
        for path, size in zip(self.paths, self.sizes, strict=True):
            if self._samples(size) == 0:
                raise DataError(
                    f"{path}: {size:,} tokens, where a batch of {B} x {T} takes {B * T + 1:,}; "
                    "take a smaller batch or sequence length"
                )
        self.num_tokens = sum(self.sizes)
        self.num_samples = sum(self._samples(size) for size in self.sizes)
        self._batch, self._other = _Batch(B, T), _Batch(B, T)
        self._is_ahead = False  # whether the other one holds the next sample
        self._shard, self._sample = 0, 0
        self._mapped: Shard | None = None
        if shuffle:
            self._generator = MersenneTwister(seed)
            self._shard_order = np.arange(len(self.sizes), dtype=np.int32)
            self._generator.permute(self._shard_order)
            self._shuffle_samples()

    def rewind(self) -> None:
        """Go back to the first sample of data that is read in order."""
        self._shard, self._sample, self._is_ahead = 0, 0, False

    @property
    def inputs(self) -> NDArray[np.int32]:
        return self._batch.inputs

    @property
    def targets(self) -> NDArray[np.int32]:
        return self._batch.targets

    def next(self) -> None:
        """Put the next sample into ``inputs`` and ``targets``; DataError where a token is none of the vocabulary."""
        if self._is_ahead:
            self._batch, self._other = self._other, self._batch
            self._is_ahead = False
        else:
            if self._sample >= self._samples(self.sizes[self._index]):
                self._advance()
            self._read(self._batch)
        self._sample += 1

    def look_ahead(self) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """The inputs and targets that ``next`` will give, read already; None where it has to begin a shard for them, or
        to refuse them. ``inputs``, ``targets`` and ``position`` stay."""
        if self._sample >= self._samples(self.sizes[self._index]):
            return None
        try:
            self._read(self._other)
        except DataError:
            return None
        self._is_ahead = True
        return self._other.inputs, self._other.targets

    def _read(self, batch: _Batch) -> None:
        """Fill ``batch`` with the sample at hand."""
        sample = int(self._sample_order[self._sample]) if self.shuffle else self._sample
        start = sample * self.B * self.T
        np.copyto(batch.tokens, self._tokens[start : start + batch.tokens.size], casting="same_kind")
        largest = int(batch.unsigned.max())
        if largest >= self.vocab_size:
            where = start + int(batch.unsigned.argmax())
            raise DataError(
                f"{self._path}: token {largest} at position {where}, where the model knows 0 to {self.vocab_size - 1}; "
                "was it made with another tokenizer?"
            )

    def accepts(self, position: Position) -> bool:
        """Whether ``position`` is one in this data."""
        if not 0 <= position.shard < len(self.sizes) or self.shuffle != (position.shard_order is not None):
            return False
        if position.shard_order is None or position.sample_order is None:
            return position.sample <= self._samples(self.sizes[position.shard])
        if position.shard_order.size != len(self.sizes):
            return False
        samples = self._samples(self.sizes[int(position.shard_order[position.shard])])
        return position.sample <= position.sample_order.size == samples

    @property
    def position(self) -> Position:
        if not self.shuffle:
            return Position(self._shard, self._sample)
        return Position(
            self._shard, self._sample, self._shard_order.copy(), self._sample_order.copy(), self._generator.state
        )

    @position.setter
    def position(self, position: Position) -> None:
        self._shard, self._sample, self._is_ahead = position.shard, position.sample, False
        if self.shuffle:
            assert position.shard_order is not None and position.sample_order is not None
            assert position.generator is not None
            self._shard_order = position.shard_order.copy()
            self._sample_order = position.sample_order.copy()
            self._generator.state = position.generator

    def fingerprint(self) -> str:
        """A hash over the names, sizes and headers of the shards: the same data gives the same."""
        digest = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}\n".encode() + file.read(HEADER_BYTES))
        return digest.hexdigest()

    def _samples(self, size: int) -> int:
        return (size - 1) // (self.B * self.T)

    @property
    def _index(self) -> int:
        return int(self._shard_order[self._shard]) if self.shuffle else self._shard

    @property
    def _path(self) -> Path:
        return self.paths[self._index]

    @property
    def _tokens(self) -> NDArray[np.unsignedinteger]:
        """Those of the shard at hand. Only that one is mapped: each mapping keeps a file open, and shards are many."""
        if self._mapped is None or self._mapped.path != self._path:
            self._mapped = read_shard(self._path)
            if self._mapped.tokens.size != self.sizes[self._index]:
                raise DataError(f"{self._path}: it has changed since training began; leave it as it is until the end")
        return self._mapped.tokens

    def _advance(self) -> None:
        self._sample = 0
        self._shard += 1
        if self._shard == len(self.sizes):
            self._shard = 0
            if self.shuffle:
                self._generator.permute(self._shard_order)
        if self.shuffle:
            self._shuffle_samples()

    def _shuffle_samples(self) -> None:
        self._sample_order = np.arange(self._samples(self.sizes[self._index]), dtype=np.int32)
        self._generator.permute(self._sample_order)
