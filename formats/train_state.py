"""Training states: a process's position in the training, its AdamW moments, and its shuffled data order."""

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.errors import RangeError, RefusedError, SizeError
from llmc_cli.formats.header import (
    HEADER_BYTES,
    TRUNCATED_REMEDY,
    Slots,
    check_range,
    check_size,
    get_uint64,
    new_slots,
    read_slots,
    set_uint64,
)
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.stream import flat_view, map_array, read_floats, write_floats

VERSION = 1
MERSENNE_WORDS = 624
MERSENNE_BYTES = 8 + 4 + 4 + 4 * MERSENNE_WORDS + 8  # 2,520
TWIST = (0, 0x9908B0DF)
"""mt19937's twist constants for lowest bit 0 and 1. The C struct stores them after the words."""

WINDOW = 1 << 20
"""Number of words searched at a time for the length of an order."""


class Mersenne(NamedTuple):
    """The state of an mt19937 generator.

    After k draws from the block of 624 words, next = k and left = 625 - k. A new generator has left = 1 and next = 0.
    """

    seed: int  # uint64; may be uninitialized in files written by llm.c
    left: int
    next: int
    words: NDArray[np.uint32]  # (624,)


@dataclass(frozen=True)
class Shuffle:
    """The data loader's permutations and random generator."""

    shard_order: NDArray[np.int32]  # (shards,)
    sample_order: NDArray[np.int32]  # (samples in the current shard,)
    mersenne: Mersenne


@dataclass(frozen=True)
class TrainState:
    """The content of the file, except for the moments and master weights."""

    processes: int
    rank: int
    step: int
    rng_state: int  # uint64, state of the model's generator
    rng_state_before_update: int  # uint64, its state before the last update
    current_shard: int
    current_sample: int  # the next sample to read
    shuffle: Shuffle | None = None
    has_master: bool = False


def read_train_state(path: str | Path, num_parameters: int | None = None) -> TrainState:
    """Read everything except the moments and master weights, and check the exact file size.

    ``num_parameters`` is the number of parameters of this rank's partition; without it, it is inferred from the
    content. Raises MagicError, VersionError, RangeError (also if an order is not a permutation), SizeError, and
    RefusedError for files of May and June 2024, which use fewer slots under the same version.
    """
    slots = read_slots(path, Kind.TRAIN_STATE)
    state = _read_fields(path, slots)
    shuffled = bool(slots[5])
    if num_parameters is None:
        num_parameters = _infer_num_parameters(path, state.has_master, shuffled)
    shards_offset = HEADER_BYTES + 4 * num_parameters * _num_arrays(state)
    content = f"{num_parameters:,} parameters"
    if not shuffled:
        check_size(path, shards_offset, content)
        return state
    shards, samples_offset = _read_count(path, "shard order", shards_offset, content)
    content += f", {shards:,} shards"
    samples, end = _read_count(path, "sample order", samples_offset, content)
    check_size(path, end + MERSENNE_BYTES, f"{content}, {samples:,} samples")
    shuffle = Shuffle(
        _read_order(path, "shard order", shards_offset + 8, shards),
        _read_order(path, "sample order", samples_offset + 8, samples),
        _read_mersenne(path, end),
    )
    check_range(path, "current shard", state.current_shard, 0, shards - 1)
    check_range(path, "current sample", state.current_sample, 0, samples)
    return dataclasses.replace(state, shuffle=shuffle)


def load_moments(
    path: str | Path,
    state: TrainState,
    m: NDArray[np.float32],
    v: NDArray[np.float32],
    master: NDArray[np.float32] | None = None,
) -> None:
    """Read the moments m and v, and the master weights if ``master`` is given, into the caller's float32 arrays.

    ``state`` is the result of ``read_train_state`` for this file. Raises NonFiniteError, SizeError if the arrays do
    not have the sizes of the file, and ValueError if they differ in size or the file has no master weights.
    """
    if m.size != v.size or (master is not None and master.size != m.size):
        raise ValueError("m, v and master must have the same size")
    if master is not None and not state.has_master:
        raise ValueError(f"{path} has no master weights")
    check_size(path, _file_size(state, m.size), f"{m.size:,} parameters")
    with Path(path).open("rb") as file:
        file.seek(HEADER_BYTES)
        for name, array in (("m", m), ("v", v), ("master", master)):
            if array is not None:
                read_floats(file, path, name, "float32", array.shape, flat_view(array, name))


def check_train_state(path: str | Path, num_parameters: int | None = None) -> tuple[TrainState, int]:
    """Check the whole file, and return its state and number of parameters."""
    state = read_train_state(path, num_parameters)
    count = (Path(path).stat().st_size - _file_size(state, 0)) // (4 * _num_arrays(state))
    with Path(path).open("rb") as file:
        file.seek(HEADER_BYTES)
        for name in ("m", "v", "master")[: _num_arrays(state)]:
            read_floats(file, path, name, "float32", (count,))
    return state, count


def write_train_state(
    path: str | Path,
    state: TrainState,
    m: NDArray[np.float32],
    v: NDArray[np.float32],
    master: NDArray[np.float32] | None = None,
) -> None:
    """Write a training state. m, v and master are float32 arrays of the same size, written in C order.

    ``master`` must be given if and only if ``state.has_master`` is true.
    """
    if m.size != v.size or (master is not None and master.size != m.size):
        raise ValueError("m, v and master must have the same size")
    if state.has_master != (master is not None):
        raise ValueError("master must be given if and only if state.has_master is true")
    slots = new_slots(Kind.TRAIN_STATE, VERSION)
    slots[2:6] = state.processes, state.rank, state.has_master, state.shuffle is not None
    slots[10] = state.step
    set_uint64(slots, 20, state.rng_state)
    set_uint64(slots, 22, state.rng_state_before_update)
    set_uint64(slots, 30, state.current_shard)
    set_uint64(slots, 32, state.current_sample)
    _read_fields(path, slots)
    with atomic_write(path) as file:
        file.write(slots.data)
        for array in (m, v, master):
            if array is not None:
                write_floats(file, array, "float32")
        if state.shuffle is not None:
            for order in (state.shuffle.shard_order, state.shuffle.sample_order):
                file.write(order.size.to_bytes(8, "little"))
                file.write(order.astype("<i4").data)
            file.write(_pack_mersenne(state.shuffle.mersenne))


def _num_arrays(state: TrainState) -> int:
    return 3 if state.has_master else 2


def _file_size(state: TrainState, num_parameters: int) -> int:
    size = HEADER_BYTES + 4 * num_parameters * _num_arrays(state)
    if state.shuffle is not None:
        size += 16 + 4 * (state.shuffle.shard_order.size + state.shuffle.sample_order.size) + MERSENNE_BYTES
    return size


def _read_fields(path: str | Path, slots: Slots) -> TrainState:
    if slots[31] != 0:
        raise RefusedError(
            path,
            "a nonzero slot 31, as in training states of May and June 2024",
            "the header of July 2024 and later",
            "resume the training with the program that wrote the file",
        )
    state = TrainState(
        processes=int(slots[2]),
        rank=int(slots[3]),
        step=int(slots[10]),
        rng_state=get_uint64(slots, 20),
        rng_state_before_update=get_uint64(slots, 22),
        current_shard=get_uint64(slots, 30),
        current_sample=get_uint64(slots, 32),
        has_master=bool(slots[4]),
    )
    check_range(path, "number of processes", state.processes, 1)
    check_range(path, "rank", state.rank, 0, state.processes - 1)
    check_range(path, "master weights flag", int(slots[4]), 0, 1)
    check_range(path, "shuffle flag", int(slots[5]), 0, 1)
    check_range(path, "step", state.step, 0)
    return state


def _read_count(path: str | Path, name: str, offset: int, content: str) -> tuple[int, int]:
    """Read the uint64 length at ``offset`` of the int32 array that follows it.

    Returns the length and the end offset of the array. Raises SizeError if the file is too short for the array.
    """
    size = Path(path).stat().st_size
    _check_min_size(path, size, offset + 8 + MERSENNE_BYTES, f"{content} and shuffled data")
    with Path(path).open("rb") as file:
        file.seek(offset)
        count = int.from_bytes(file.read(8), "little")
    check_range(path, f"length of the {name}", count, 1)
    end = offset + 8 + 4 * count
    _check_min_size(path, size, end + MERSENNE_BYTES, f"{content} and a {name} of length {count:,}")
    return count, end


def _check_min_size(path: str | Path, size: int, expected: int, content: str) -> None:
    if size < expected:
        raise SizeError(
            path, f"a file size of {size:,} bytes", f"at least {expected:,} bytes for {content}", TRUNCATED_REMEDY
        )


def _read_order(path: str | Path, name: str, offset: int, count: int) -> NDArray[np.int32]:
    order = map_array(path, "int32", offset, count).astype(np.int32)
    if not _is_permutation(order):
        raise RangeError(
            path,
            f"a {name} that is not a permutation",
            f"each of the numbers 0 to {count - 1:,} once",
            "the file is damaged",
        )
    return order


def _is_permutation(order: NDArray[np.int32]) -> bool:
    return bool(np.array_equal(np.sort(order), np.arange(order.size)))


def _read_mersenne(path: str | Path, offset: int) -> Mersenne:
    with Path(path).open("rb") as file:
        file.seek(offset)
        seed, left, next_ = np.frombuffer(file.read(16), "<u8,<i4,<u4")[0]
        words = np.frombuffer(file.read(4 * MERSENNE_WORDS), "<u4").astype(np.uint32)
        twist = np.frombuffer(file.read(8), "<u4")
    mersenne = Mersenne(int(seed), int(left), int(next_), words)
    is_new = (mersenne.left, mersenne.next) == (1, 0)
    is_in_block = mersenne.left + mersenne.next == MERSENNE_WORDS + 1 and 1 <= mersenne.next <= MERSENNE_WORDS
    if tuple(twist) != TWIST or not (is_new or is_in_block):
        raise RangeError(
            path,
            f"a generator with left {mersenne.left}, next {mersenne.next}, constants {twist[0]:#x} and {twist[1]:#x}",
            f"an mt19937 with left + next = {MERSENNE_WORDS + 1}, constants {TWIST[0]:#x} and {TWIST[1]:#x}",
            "the file is damaged",
        )
    return mersenne


def _pack_mersenne(mersenne: Mersenne) -> bytes:
    if mersenne.words.shape != (MERSENNE_WORDS,):
        raise ValueError(f"expected {MERSENNE_WORDS} words for an mt19937, got shape {mersenne.words.shape}")
    packed = io.BytesIO()
    packed.write(mersenne.seed.to_bytes(8, "little"))
    packed.write(mersenne.left.to_bytes(4, "little", signed=True))
    packed.write(mersenne.next.to_bytes(4, "little"))
    packed.write(mersenne.words.astype("<u4").tobytes())
    packed.write(np.array(TWIST, "<u4").tobytes())
    return packed.getvalue()


def _infer_num_parameters(path: str | Path, has_master: bool, shuffled: bool) -> int:
    """Infer the number of parameters from the content of the file.

    Without shuffled data it follows from the file size. With shuffled data, the two orders are searched backward from
    the end of the file: each is a permutation of length n (at least 1), preceded by the uint64 n. The result is
    unique, since the zero upper half of another such uint64 inside the true order would be a second 0 in its
    permutation.
    """
    end = Path(path).stat().st_size - (MERSENNE_BYTES if shuffled else 0)
    for _ in range(2 if shuffled else 0):
        end = _find_order_start(path, end)
    arrays = 3 if has_master else 2
    if end < HEADER_BYTES or (end - HEADER_BYTES) % (4 * arrays):
        raise SizeError(
            path,
            f"{end - HEADER_BYTES:,} bytes of moments and master weights",
            f"{arrays} float32 arrays of the same size",
            "the file is truncated or damaged",
        )
    return (end - HEADER_BYTES) // (4 * arrays)


def _find_order_start(path: str | Path, end: int) -> int:
    """Return the offset of the order, including its uint64 length, that ends at byte ``end``."""
    total = (end - HEADER_BYTES) // 4
    if total < 2 or end % 4:
        raise SizeError(
            path, f"{total * 4:,} bytes after the header", "moments and shuffled data", "the file is truncated"
        )
    words = map_array(path, "int32", HEADER_BYTES, total)
    for stop in range(total - 1, 0, -WINDOW):
        first = max(0, stop - WINDOW)
        lengths = total - 2 - np.arange(first, stop)  # the order's length if its uint64 starts at this word
        candidates = (words[first:stop] == lengths) & (words[first + 1 : stop + 1] == 0) & (lengths > 0)
        for start in np.flatnonzero(candidates)[::-1] + first:
            if _is_permutation(words[start + 2 :]):
                return HEADER_BYTES + 4 * int(start)
    raise SizeError(
        path,
        "no order of shards or samples at the end of the file",
        "a permutation preceded by its length",
        "the file is truncated or damaged",
    )
