"""Training states: reading and writing."""

import dataclasses
import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc_cli.formats import stream
from llmc_cli.formats.errors import MagicError, NonFiniteError, RangeError, RefusedError, SizeError, VersionError
from llmc_cli.formats.train_state import (
    MERSENNE_BYTES,
    Mersenne,
    Shuffle,
    TrainState,
    check_train_state,
    load_moments,
    read_train_state,
    write_train_state,
)

M, V, MASTER = (np.array(values, np.float32) for values in ([1, 2, 3], [0.5, 0.25, 0.125], [-1, -2, -3]))
WORDS = np.arange(624, dtype=np.uint32) * 7
PLAIN = TrainState(
    processes=4,
    rank=3,
    step=70,
    rng_state=2**64 - 1,
    rng_state_before_update=2**33 + 5,
    current_shard=1,
    current_sample=2**32 + 9,
)
SHUFFLED = dataclasses.replace(
    PLAIN,
    current_sample=4,
    has_master=True,
    shuffle=Shuffle(
        np.array([1, 2, 0], np.int32), np.array([4, 0, 3, 1, 2], np.int32), Mersenne(2**63 + 1, 601, 24, WORDS)
    ),
)


def plain_slots(**changes):
    slots = {0: 20240527, 1: 1, 2: 4, 3: 3, 10: 70, 20: -1, 21: -1, 22: 5, 23: 2, 30: 1, 32: 9, 33: 1}
    slots |= {int(slot[1:]): value for slot, value in changes.items()}
    return struct.pack("<256i", *(slots.get(slot, 0) for slot in range(256)))


GOLDEN_PLAIN = plain_slots() + struct.pack("<6f", 1, 2, 3, 0.5, 0.25, 0.125)
GENERATOR = struct.pack("<QiI624I2I", 2**63 + 1, 601, 24, *(7 * n for n in range(624)), 0, 0x9908B0DF)
GOLDEN_SHUFFLED = (
    plain_slots(s4=1, s5=1, s32=4, s33=0)
    + struct.pack("<9f", 1, 2, 3, 0.5, 0.25, 0.125, -1, -2, -3)
    + struct.pack("<Q3i", 3, 1, 2, 0)
    + struct.pack("<Q5i", 5, 4, 0, 3, 1, 2)
    + GENERATOR
)


def assert_equal(found, expected):
    assert dataclasses.replace(found, shuffle=None) == dataclasses.replace(expected, shuffle=None)
    assert (found.shuffle is None) == (expected.shuffle is None)
    if found.shuffle:
        assert np.array_equal(found.shuffle.shard_order, expected.shuffle.shard_order)
        assert np.array_equal(found.shuffle.sample_order, expected.shuffle.sample_order)
        assert found.shuffle.mersenne[:3] == expected.shuffle.mersenne[:3]
        assert np.array_equal(found.shuffle.mersenne.words, expected.shuffle.mersenne.words)


def test_mersenne_twister_takes_2520_bytes():
    assert MERSENNE_BYTES == len(GENERATOR) == 2520


@pytest.mark.parametrize(
    ("state", "master", "content"), [(PLAIN, None, GOLDEN_PLAIN), (SHUFFLED, MASTER, GOLDEN_SHUFFLED)]
)
def test_golden_bytes(tmp_path, state, master, content):
    write_train_state(tmp_path / "s", state, M, V, master)
    assert (tmp_path / "s").read_bytes() == content
    found = read_train_state(tmp_path / "s", 3)
    assert_equal(found, state)
    assert_equal(check_train_state(tmp_path / "s")[0], state)
    assert check_train_state(tmp_path / "s")[1] == 3
    m, v, loaded = (np.full(3, np.nan, np.float32) for _ in range(3))
    load_moments(tmp_path / "s", found, m, v, None if master is None else loaded)
    assert m.tolist() == M.tolist()
    assert v.tolist() == V.tolist()
    if master is not None:
        assert loaded.tolist() == MASTER.tolist()


def test_loading_without_master_weights(tmp_path):
    (tmp_path / "s").write_bytes(GOLDEN_SHUFFLED)
    m, v = np.empty(3, np.float32), np.empty(3, np.float32)
    load_moments(tmp_path / "s", read_train_state(tmp_path / "s", 3), m, v)
    assert v.tolist() == V.tolist()


uint64 = st.integers(0, 2**64 - 1)
shuffles = st.builds(
    lambda shards, samples, drawn, seed: Shuffle(
        np.random.default_rng(seed).permutation(shards).astype(np.int32),
        np.random.default_rng(seed).permutation(samples).astype(np.int32),
        Mersenne(
            seed,
            625 - drawn if drawn else 1,
            drawn,
            np.random.default_rng(seed).integers(0, 2**32, 624, dtype=np.uint32),
        ),
    ),
    st.integers(1, 20),
    st.integers(1, 50),
    st.integers(0, 624),
    uint64,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    processes=st.integers(1, 9),
    step=st.integers(0, 2**31 - 1),
    rng=st.tuples(uint64, uint64),
    shuffle=st.none() | shuffles,
    has_master=st.booleans(),
    size=st.integers(1, 30),
)
def test_round_trip(tmp_path, processes, step, rng, shuffle, has_master, size):
    samples = 2**40 if shuffle is None else shuffle.sample_order.size
    state = TrainState(processes, processes - 1, step, *rng, 0, samples, shuffle, has_master)
    m, v, master = np.random.default_rng(step).normal(size=(3, size)).astype(np.float32)
    write_train_state(tmp_path / "s", state, m, v, master if has_master else None)
    assert_equal(read_train_state(tmp_path / "s", size), state)
    found, share = check_train_state(tmp_path / "s")
    assert_equal(found, state)
    assert share == size


def test_inference_of_num_parameters_with_orders_longer_than_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr("llmc_cli.formats.train_state.WINDOW", 16)
    order = np.random.default_rng(0).permutation(1000).astype(np.int32)
    shuffle = Shuffle(np.arange(3, dtype=np.int32), order, SHUFFLED.shuffle.mersenne)
    write_train_state(tmp_path / "s", dataclasses.replace(SHUFFLED, shuffle=shuffle), M, V, MASTER)
    assert check_train_state(tmp_path / "s")[1] == 3


@pytest.mark.parametrize("content", [GOLDEN_PLAIN, GOLDEN_SHUFFLED])
@pytest.mark.parametrize("change", [-1, -4, -2520, 1, 4])
def test_truncated_and_oversized_files_are_rejected(tmp_path, content, change):
    (tmp_path / "s").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(SizeError):
        read_train_state(tmp_path / "s", 3)


@pytest.mark.parametrize("content", [GOLDEN_PLAIN, GOLDEN_SHUFFLED])
@pytest.mark.parametrize("change", [-1, -4, 1, 4])
def test_changed_size_is_rejected_without_num_parameters(tmp_path, content, change):
    (tmp_path / "s").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises((SizeError, RangeError)):
        read_train_state(tmp_path / "s")


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("content", [GOLDEN_PLAIN, GOLDEN_SHUFFLED])
def test_state_of_another_model_is_rejected(tmp_path, content, size):
    (tmp_path / "s").write_bytes(content)
    with pytest.raises((SizeError, RangeError)):
        read_train_state(tmp_path / "s", size)
    with pytest.raises(SizeError):
        load_moments(
            tmp_path / "s", read_train_state(tmp_path / "s"), np.empty(size, np.float32), np.empty(size, np.float32)
        )


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"s0": 20240326}, MagicError),
        ({"s1": 2}, VersionError),
        ({"s2": 0}, RangeError),
        ({"s3": 4}, RangeError),
        ({"s3": -1}, RangeError),
        ({"s4": 2}, RangeError),
        ({"s5": -1}, RangeError),
        ({"s10": -1}, RangeError),
        ({"s4": 1}, SizeError),
        ({"s5": 1}, (SizeError, RangeError)),
    ],
)
def test_invalid_headers_are_rejected(tmp_path, changes, error):
    (tmp_path / "s").write_bytes(plain_slots(**changes) + GOLDEN_PLAIN[1024:])
    with pytest.raises(error):
        read_train_state(tmp_path / "s", 3)


def test_states_of_may_and_june_2024_are_refused(tmp_path):
    (tmp_path / "s").write_bytes(plain_slots(s31=1) + GOLDEN_PLAIN[1024:])
    with pytest.raises(RefusedError, match="May and June 2024"):
        read_train_state(tmp_path / "s", 3)


def damage(offset, layout, *values):
    """Return the shuffled golden file with bytes changed at ``offset`` after the moments."""
    content = bytearray(GOLDEN_SHUFFLED)
    struct.pack_into(layout, content, 1024 + 36 + offset, *values)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (damage(0, "<Q", 2**63), SizeError),
        (damage(0, "<Q", 0), RangeError),
        (damage(0, "<Q", 2), (SizeError, RangeError)),
        (damage(8, "<i", 2), RangeError),
        (damage(8, "<i", 3), RangeError),
        (damage(8, "<i", -1), RangeError),
        (damage(20, "<Q", 2**64 - 1), SizeError),
        (damage(20, "<Q", 4), SizeError),
        (damage(28, "<i", 0), RangeError),
        (damage(56, "<i", 600), RangeError),
        (damage(60, "<I", 625), RangeError),
        (damage(60, "<I", 2**32 - 1), RangeError),
        (damage(48 + 2516, "<I", 0x9908B0DE), RangeError),
        (plain_slots(s4=1, s5=1, s30=3, s32=4, s33=0) + GOLDEN_SHUFFLED[1024:], RangeError),
        (plain_slots(s4=1, s5=1, s32=6, s33=0) + GOLDEN_SHUFFLED[1024:], RangeError),
    ],
)
def test_damaged_shuffles_are_rejected_without_allocating(tmp_path, content, error):
    (tmp_path / "s").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read_train_state(tmp_path / "s", 3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["m", "v", "master"])
def test_check_and_load_report_the_index_of_a_nan(tmp_path, name):
    arrays = {"m": M.copy(), "v": V.copy(), "master": MASTER.copy()}
    arrays[name][1] = math.nan
    write_train_state(tmp_path / "s", SHUFFLED, **arrays)
    with pytest.raises(NonFiniteError, match=rf"nan at {name}\[1\]"):
        check_train_state(tmp_path / "s")
    state = read_train_state(tmp_path / "s", 3)
    with pytest.raises(NonFiniteError, match=rf"nan at {name}\[1\]"):
        load_moments(tmp_path / "s", state, *(np.empty(3, np.float32) for _ in range(3)))


def test_invalid_arguments_raise(tmp_path):
    for arrays in ((M, V[:2]), (M, V, MASTER), (M, V, MASTER[:2])):
        with pytest.raises(ValueError, match="master"):
            write_train_state(tmp_path / "s", PLAIN, *arrays)
    with pytest.raises(ValueError, match="master"):
        write_train_state(tmp_path / "s", SHUFFLED, M, V)
    with pytest.raises(RangeError, match="rank"):
        write_train_state(tmp_path / "s", dataclasses.replace(PLAIN, rank=4), M, V)
    with pytest.raises(ValueError, match="624"):
        short = Shuffle(np.arange(3), np.arange(5), Mersenne(1, 1, 0, WORDS[:600]))
        write_train_state(tmp_path / "s", dataclasses.replace(SHUFFLED, shuffle=short), M, V, MASTER)
    assert list(tmp_path.iterdir()) == []
    write_train_state(tmp_path / "s", PLAIN, M, V)
    with pytest.raises(ValueError, match="has no master weights"):
        load_moments(tmp_path / "s", PLAIN, M.copy(), V.copy(), MASTER.copy())
    with pytest.raises(ValueError, match="the same size"):
        load_moments(tmp_path / "s", PLAIN, M.copy(), V[:2].copy())
    with pytest.raises(ValueError, match="float32"):
        load_moments(tmp_path / "s", PLAIN, np.zeros(3), V.copy())


def test_writing_and_loading_allocate_a_few_chunks_only(tmp_path):
    m, v = np.ones((2, 20 * stream.CHUNK), np.float32)
    tracemalloc.start()
    try:
        write_train_state(tmp_path / "s", PLAIN, m, v)
        load_moments(tmp_path / "s", PLAIN, m, v)
        assert tracemalloc.get_traced_memory()[1] < 16 * stream.CHUNK
    finally:
        tracemalloc.stop()
