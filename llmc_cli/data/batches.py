"""Batches of tokens from shards, sequential or shuffled, in the same order as llm.c's data loader."""

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


@dataclass(frozen=True)
class Position:
    """The state of a ``Batches``, from which it can continue."""

    shard: int
    sample: int  # the next one to read
    shard_order: NDArray[np.int32] | None = None  # this and the next two only if shuffled
    sample_order: NDArray[np.int32] | None = None
    generator: tuple[NDArray[np.uint32], int] | None = None


class _Batch:
    """A buffer for one sample of B·T+1 ``tokens``, with views of its inputs and targets."""

    def __init__(self, B: int, T: int) -> None:
        self.tokens = np.zeros(B * T + 1, np.int32)
        self.unsigned = self.tokens.view(np.uint32)
        self.inputs = self.tokens[:-1].reshape(B, T)
        self.targets = self.tokens[1:].reshape(B, T)


class Batches:
    """An endless sequence of batches from the shards that match a glob, sorted by name.

    ``next_batch`` sets ``inputs`` and ``targets`` (B,T) int32, where targets are shifted by one position. They are
    valid until its next call. Memory is allocated only at the start of a shard.

    A sample is B·T+1 tokens; a shard holds (tokens - 1) // (B·T) of them, at multiples of B·T. With a ``shuffle_seed``
    the order of the shards is permuted at the start of each epoch, and that of the samples at the start of each shard.
    Raises DataError if there is no shard, or one is smaller than a sample; ``option`` is the option that ``pattern``
    comes from, for the message.
    """

    def __init__(
        self, pattern: str, B: int, T: int, vocab_size: int, shuffle_seed: int | None = None, option: str = ""
    ) -> None:
        # a file with exactly this name, even if it contains special characters of a glob
        self.paths = [Path(pattern)] if Path(pattern).is_file() else [Path(name) for name in sorted(glob.glob(pattern))]
        if not self.paths:
            raise DataError(f"{option} {pattern}: no file matches; run `llmc prepro` first".lstrip())
        self.pattern, self.B, self.T, self.vocab_size = pattern, B, T, vocab_size
        self.sizes = [read_shard(path).tokens.size for path in self.paths]  # tokens by shard
        for path, size in zip(self.paths, self.sizes, strict=True):
            if self._samples(size) == 0:
                raise DataError(
                    f"{path}: found {size:,} tokens, expected at least {B * T + 1:,} for a batch of {B} x {T}; "
                    "use a smaller batch or sequence length"
                )
        self.num_tokens = sum(self.sizes)
        self._batch, self._ahead = _Batch(B, T), _Batch(B, T)
        self._has_read_ahead = False  # whether _ahead holds the next sample
        self._shard, self._sample = 0, 0
        self._mapped: Shard | None = None
        self.shuffle = shuffle_seed is not None
        if shuffle_seed is not None:
            self._generator = MersenneTwister(shuffle_seed)
            self._shard_order = np.arange(len(self.sizes), dtype=np.int32)
            self._generator.permute(self._shard_order)
            self._shuffle_samples()

    def rewind(self) -> None:
        """Go back to the first sample; only for data that are not shuffled."""
        self._shard, self._sample, self._has_read_ahead = 0, 0, False

    @property
    def inputs(self) -> NDArray[np.int32]:
        return self._batch.inputs

    @property
    def targets(self) -> NDArray[np.int32]:
        return self._batch.targets

    def next_batch(self) -> None:
        """Read the next sample into ``inputs`` and ``targets``; DataError if a token is not in the vocabulary."""
        if self._has_read_ahead:
            self._batch, self._ahead = self._ahead, self._batch
            self._has_read_ahead = False
        else:
            if self._sample >= self._samples(self.sizes[self._index]):
                self._advance()
            self._read(self._batch)
        self._sample += 1

    def read_ahead(self) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
        """Read and return the inputs and targets that the next ``next_batch`` will set.

        None at the end of a shard or if a token is not in the vocabulary. ``inputs``, ``targets`` and ``position`` do
        not change.
        """
        if self._sample >= self._samples(self.sizes[self._index]):
            return None
        try:
            self._read(self._ahead)
        except DataError:
            return None
        self._has_read_ahead = True
        return self._ahead.inputs, self._ahead.targets

    def _read(self, batch: _Batch) -> None:
        """Read the sample at the current position into ``batch``."""
        sample = int(self._sample_order[self._sample]) if self.shuffle else self._sample
        start = sample * self.B * self.T
        np.copyto(batch.tokens, self._tokens[start : start + batch.tokens.size], casting="same_kind")
        largest = int(batch.unsigned.max())
        if largest >= self.vocab_size:
            position = start + int(batch.unsigned.argmax())
            raise DataError(
                f"{self._path}: token {largest} at position {position}, expected 0 to {self.vocab_size - 1}; was the "
                "file written with another tokenizer than the model's?"
            )

    def accepts(self, position: Position) -> bool:
        """Return whether ``position`` is valid for these shards and this batch shape."""
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
        self._shard, self._sample, self._has_read_ahead = position.shard, position.sample, False
        if self.shuffle:
            assert position.shard_order is not None and position.sample_order is not None
            assert position.generator is not None
            self._shard_order = position.shard_order.copy()
            self._sample_order = position.sample_order.copy()
            self._generator.state = position.generator

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and headers of the shards."""
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
        """The tokens of the current shard. Only one shard is mapped, since a mapping keeps its file open."""
        if self._mapped is None or self._mapped.path != self._path:
            self._mapped = read_shard(self._path)
            if self._mapped.tokens.size != self.sizes[self._index]:
                raise DataError(
                    f"{self._path}: the file has changed since training began; do not modify it during training"
                )
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
