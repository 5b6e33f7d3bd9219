"""The training state beside a model file: where a process stood, its moments, and its shuffled data."""

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
    Slots,
    check_range,
    check_size,
    get_uint64,
    new_slots,
    read_slots,
    set_uint64,
)
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.stream import as_float32, map_array, read_floats, write_floats

VERSION = 1
MERSENNE_WORDS = 624
MERSENNE_BYTES = 8 + 4 + 4 + 4 * MERSENNE_WORDS + 8  # 2,520
TWIST = (0, 0x9908B0DF)
"""mt19937's matrix row for the lowest bit 0 and 1; a C struct holds it after the words."""

WINDOW = 1 << 20
"""Words searched at a time for the length of the sample order."""


class Mersenne(NamedTuple):
    """An mt19937: after k draws from its block of 624 words next = k and left = 625 - k; fresh: left 1, next 0."""

    seed: int  # uint64; may be garbage in files of the C program
    left: int
    next: int
    words: NDArray[np.uint32]  # (624,)


@dataclass(frozen=True)
class Shuffle:
    """The data loader's permutations and generator."""

    shard_order: NDArray[np.int32]  # (shards,)
    sample_order: NDArray[np.int32]  # (samples in the current shard,)
    mersenne: Mersenne


@dataclass(frozen=True)
class TrainState:
    """Everything in the file but the moments and master weights."""

    processes: int
    rank: int
    step: int
    rng_state: int  # uint64, the model's generator
    rng_state_before_update: int  # uint64, the same before the last update
    current_shard: int
    current_sample: int  # the next one to read
    shuffle: Shuffle | None = None
    has_master: bool = False


def read_train_state(path: str | Path, num_parameters: int | None = None) -> TrainState:
    """Read all but the moments, of ``num_parameters`` (this rank's share) each; without it, it is found by content.

    Checks the header, the exact size, and that the orders are permutations. Raises MagicError, VersionError,
    RangeError, SizeError, and RefusedError for files of May and June 2024 (fewer slots under the same version).
    """
    slots = read_slots(path, Kind.TRAIN_STATE)
    state = _read_fields(path, slots)
    shuffled = bool(slots[5])
    if num_parameters is None:
        num_parameters = _find_share(path, state.has_master, shuffled)
    orders_at = HEADER_BYTES + 4 * num_parameters * _arrays(state)
    why = f"{num_parameters:,} parameters"
    if not shuffled:
        check_size(path, orders_at, why)
        return state
    shards, samples_at = _read_count(path, orders_at, why)
    samples, end = _read_count(path, samples_at, f"{why}, {shards:,} shards")
    check_size(path, end + MERSENNE_BYTES, f"{why}, {shards:,} shards, {samples:,} samples")
    shuffle = Shuffle(
        _read_order(path, "shard order", orders_at + 8, shards),
        _read_order(path, "sample order", samples_at + 8, samples),
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
    """Stream m, v and, where ``state.has_master``, the master weights into the caller's float32 arrays.

    ``state`` is what ``read_train_state`` gave for this file; without ``master`` the master weights stay unread.
    Raises NonFiniteError, and ValueError where the arrays are not of the size that the file has.
    """
    if m.size != v.size or (master is not None and master.size != m.size):
        raise ValueError("the moments and master weights must have one size")
    if master is not None and not state.has_master:
        raise ValueError(f"{path} holds no master weights")
    check_size(path, _file_size(state, m.size), f"{m.size:,} parameters")
    with Path(path).open("rb") as file:
        file.seek(HEADER_BYTES)
        for name, array in (("m", m), ("v", v), ("master", master)):
            if array is not None:
                read_floats(file, path, name, "float32", array.shape, as_float32(array, name))


def check_train_state(path: str | Path, num_parameters: int | None = None) -> tuple[TrainState, int]:
    """All checks of reading without keeping the moments; gives the number of parameters, too."""
    state = read_train_state(path, num_parameters)
    share = (Path(path).stat().st_size - _file_size(state, 0)) // (4 * _arrays(state))
    with Path(path).open("rb") as file:
        file.seek(HEADER_BYTES)
        for name in ("m", "v", "master")[: _arrays(state)]:
            read_floats(file, path, name, "float32", (share,))
    return state, share


def write_train_state(
    path: str | Path,
    state: TrainState,
    m: NDArray[np.float32],
    v: NDArray[np.float32],
    master: NDArray[np.float32] | None = None,
) -> None:
    """Write a training state; m, v and master are float32 of one size, written in C order.

    ``master`` must be given where, and only where, ``state.has_master``.
    """
    if m.size != v.size or (master is not None and master.size != m.size):
        raise ValueError("the moments and master weights must have one size")
    if state.has_master != (master is not None):
        raise ValueError("master weights are given where state.has_master says so, and only there")
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


def _arrays(state: TrainState) -> int:
    return 3 if state.has_master else 2


def _file_size(state: TrainState, num_parameters: int) -> int:
    size = HEADER_BYTES + 4 * num_parameters * _arrays(state)
    if state.shuffle is not None:
        size += 16 + 4 * (state.shuffle.shard_order.size + state.shuffle.sample_order.size) + MERSENNE_BYTES
    return size


def _read_fields(path: str | Path, slots: Slots) -> TrainState:
    if slots[31] != 0:
        raise RefusedError(
            path,
            "slot 31 not to be 0, as in training states of May and June 2024",
            "a training state with the slots of July 2024 and later",
            "resume it with the program that wrote it",
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
    check_range(path, "shuffled data flag", int(slots[5]), 0, 1)
    check_range(path, "step", state.step, 0)
    return state


def _read_count(path: str | Path, offset: int, why: str) -> tuple[int, int]:
    """The uint64 length at ``offset`` of an int32 array behind it, and where that array ends, which is in the file."""
    size = Path(path).stat().st_size
    if offset + 8 + MERSENNE_BYTES > size:
        raise SizeError(path, f"{size:,} bytes", f"at least {offset + 8 + MERSENNE_BYTES:,} ({why}, shuffled data)")
    with Path(path).open("rb") as file:
        file.seek(offset)
        count = int.from_bytes(file.read(8), "little")
    check_range(path, "length of an order", count, 1)
    end = offset + 8 + 4 * count
    if end + MERSENNE_BYTES > size:
        raise SizeError(path, f"{size:,} bytes", f"at least {end + MERSENNE_BYTES:,} ({why}, an order of {count:,})")
    return count, end


def _read_order(path: str | Path, name: str, offset: int, count: int) -> NDArray[np.int32]:
    order = map_array(path, "int32", offset, count).astype(np.int32)
    if not _is_permutation(order):
        raise RangeError(path, f"a {name} that repeats or leaves out numbers", f"a permutation of {count:,} numbers")
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
    fresh = (mersenne.left, mersenne.next) == (1, 0)
    in_block = mersenne.left + mersenne.next == MERSENNE_WORDS + 1 and 1 <= mersenne.next <= MERSENNE_WORDS
    if tuple(twist) != TWIST or not (fresh or in_block):
        raise RangeError(
            path,
            f"a generator with left {mersenne.left}, next {mersenne.next}, constants {twist[0]:#x} and {twist[1]:#x}",
            f"an mt19937: left + next = {MERSENNE_WORDS + 1}, constants {TWIST[0]:#x} and {TWIST[1]:#x}",
            "the file is damaged",
        )
    return mersenne


def _pack_mersenne(mersenne: Mersenne) -> bytes:
    if mersenne.words.shape != (MERSENNE_WORDS,):
        raise ValueError(f"an mt19937 has {MERSENNE_WORDS} words, not {mersenne.words.shape}")
    packed = io.BytesIO()
    packed.write(mersenne.seed.to_bytes(8, "little"))
    packed.write(mersenne.left.to_bytes(4, "little", signed=True))
    packed.write(mersenne.next.to_bytes(4, "little"))
    packed.write(mersenne.words.astype("<u4").tobytes())
    packed.write(np.array(TWIST, "<u4").tobytes())
    return packed.getvalue()


def _find_share(path: str | Path, has_master: bool, shuffled: bool) -> int:
    """How many parameters the file is for, where nobody says it.

    Without shuffled data the size gives it. With it, the two orders are found from the end: each is a permutation of
    as many numbers (one at least) as the uint64 before it says. That is unique, since such a uint64 within the true
    order would be a second 0 in its permutation.
    """
    end = Path(path).stat().st_size - (MERSENNE_BYTES if shuffled else 0)
    for _ in range(2 if shuffled else 0):
        end = _find_order_start(path, end)
    arrays = 3 if has_master else 2
    if end < HEADER_BYTES or (end - HEADER_BYTES) % (4 * arrays):
        raise SizeError(path, f"{end - HEADER_BYTES:,} bytes of moments", f"{arrays} float32 arrays of one size")
    return (end - HEADER_BYTES) // (4 * arrays)


def _find_order_start(path: str | Path, end: int) -> int:
    """Where the order that ends at byte ``end`` starts, its uint64 length included."""
    total = (end - HEADER_BYTES) // 4
    if total < 2 or end % 4:
        raise SizeError(path, f"{total * 4:,} bytes", "moments and shuffled data", "it is cut off")
    words = map_array(path, "int32", HEADER_BYTES, total)
    for stop in range(total - 1, 0, -WINDOW):
        first = max(0, stop - WINDOW)
        lengths = total - 2 - np.arange(first, stop)  # of an order whose uint64 starts at this word
        starts = (words[first:stop] == lengths) & (words[first + 1 : stop + 1] == 0) & (lengths > 0)
        for at in np.flatnonzero(starts)[::-1] + first:
            if _is_permutation(words[at + 2 :]):
                return HEADER_BYTES + 4 * int(at)
    raise SizeError(path, "no order of shards and samples before its end", "one", "it is cut off, or is damaged")
