import os

import numpy as np
import pytest

from llmc_cli.data.batches import Batches
from llmc_cli.errors import DataError
from llmc_cli.formats.shard import write_shard
from llmc_cli.rng import MersenneTwister


@pytest.fixture
def two_shards(tmp_path):
    """A glob of shards of 25 and 14 tokens: 4 and 2 samples with B·T = 6."""
    write_shard(tmp_path / "a_0.bin", np.arange(25))
    write_shard(tmp_path / "a_1.bin", np.arange(100, 114))
    return str(tmp_path / "a_*.bin")


def starts(batches, count):
    """Return the first token of each of the next ``count`` samples."""
    seen = []
    for _ in range(count):
        batches.next_batch()
        seen.append(int(batches.inputs[0, 0]))
    return seen


def test_sequential_order_wraps_around(two_shards):
    batches = Batches(two_shards, 2, 3, 200)
    assert starts(batches, 6) == [0, 6, 12, 18, 100, 106]
    assert starts(batches, 1) == [0]


def test_inputs_and_targets(two_shards):
    batches = Batches(two_shards, 2, 3, 200)
    batches.next_batch()
    assert batches.inputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batches.targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batches.inputs.dtype == batches.targets.dtype == np.int32
    assert batches.inputs.flags.c_contiguous and batches.targets.flags.c_contiguous


def test_shuffled_order_is_that_of_llm_c(two_shards):
    generator = MersenneTwister(42)
    shards = np.arange(2, dtype=np.int32)
    bases, counts = [0, 100], [4, 2]
    expected = []
    for _ in range(2):  # epochs; each permutes the previous order of the shards
        generator.permute(shards)
        for shard in shards:
            samples = np.arange(counts[shard], dtype=np.int32)
            generator.permute(samples)
            expected += [bases[shard] + 6 * int(sample) for sample in samples]
    assert starts(Batches(two_shards, 2, 3, 200, shuffle_seed=42), 12) == expected


@pytest.mark.parametrize("seed", [None, 42])
@pytest.mark.parametrize("after", range(8))
def test_position_restores_the_sequence(two_shards, seed, after):
    batches = Batches(two_shards, 2, 3, 200, shuffle_seed=seed)
    starts(batches, after)
    position = batches.position
    expected = starts(batches, 20)
    other = Batches(two_shards, 2, 3, 200, shuffle_seed=seed)
    assert other.accepts(position)
    other.position = position
    assert starts(other, 20) == expected


@pytest.mark.parametrize("seed", [None, 42])
def test_read_ahead_does_not_change_the_sequence(two_shards, seed):
    expected = starts(Batches(two_shards, 2, 3, 200, shuffle_seed=seed), 40)
    batches, found, seen = Batches(two_shards, 2, 3, 200, shuffle_seed=seed), [], 0
    for step in range(40):
        batches.next_batch()
        inputs, targets, position = batches.inputs, batches.targets, batches.position
        before = inputs.tolist(), targets.tolist()
        ahead = batches.read_ahead() if step % 3 else None
        assert (inputs.tolist(), targets.tolist()) == before
        assert str(batches.position) == str(position)
        found.append(before[0][0][0])
        if ahead is not None:
            seen += 1
            assert int(ahead[0][0, 0]) == expected[(step + 1) % 40] or step == 39
    assert found == expected
    assert seen >= 15


def test_next_batch_returns_the_arrays_read_ahead(two_shards):
    batches = Batches(two_shards, 2, 3, 200)
    batches.next_batch()
    inputs, targets = batches.read_ahead()
    batches.next_batch()
    assert batches.inputs is inputs and batches.targets is targets
    assert (inputs[0, 0], targets[0, 0]) == (6, 7)


@pytest.mark.parametrize("seed", [None, 42])
def test_setting_the_position_discards_what_was_read_ahead(two_shards, seed):
    batches = Batches(two_shards, 2, 3, 200, shuffle_seed=seed)
    position = batches.position
    expected = starts(batches, 3)
    batches.read_ahead()
    batches.position = position
    assert starts(batches, 3) == expected
    if seed is None:
        batches.read_ahead()
        batches.rewind()
        assert starts(batches, 3) == expected


def test_invalid_token_raises_in_next_batch_not_in_read_ahead(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([0, 1, 2, 3, 4, 99, 6]))
    batches = Batches(str(tmp_path / "a.bin"), 1, 3, 50)
    batches.next_batch()
    assert batches.read_ahead() is None
    with pytest.raises(DataError, match="token 99 at position 5"):
        batches.next_batch()


def test_accepts_rejects_positions_of_other_data(two_shards):
    position = Batches(two_shards, 2, 3, 200, shuffle_seed=42).position
    assert not Batches(two_shards, 1, 3, 200, shuffle_seed=42).accepts(position)
    assert not Batches(two_shards, 2, 3, 200).accepts(position)
    assert not Batches(two_shards.replace("*", "0"), 2, 3, 200, shuffle_seed=42).accepts(position)


def test_position_is_a_copy(two_shards):
    batches = Batches(two_shards, 2, 3, 200, shuffle_seed=42)
    position = batches.position
    before = position.sample_order.copy()
    starts(batches, 7)
    np.testing.assert_array_equal(position.sample_order, before)


def test_num_tokens_is_the_total_of_all_shards(two_shards):
    assert Batches(two_shards, 2, 3, 200).num_tokens == 39


def test_token_outside_the_vocabulary_is_rejected(two_shards):
    batches = Batches(two_shards, 2, 3, 110)
    starts(batches, 5)
    with pytest.raises(DataError, match=r"a_1.bin: token 112 at position 12"):
        batches.next_batch()


def test_file_name_with_glob_characters(tmp_path):
    write_shard(tmp_path / "run [1]" / "a.bin", np.arange(25))
    assert starts(Batches(str(tmp_path / "run [1]" / "a.bin"), 2, 3, 200), 2) == [0, 6]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of this kind")
@pytest.mark.parametrize("seed", [None, 42])
def test_more_shards_than_the_limit_of_open_files(tmp_path, seed):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(80):
        write_shard(tmp_path / f"a_{number:03d}.bin", np.arange(7))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        batches = Batches(str(tmp_path / "*.bin"), 2, 3, 200, shuffle_seed=seed)
        starts(batches, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shard_that_changes_during_training_is_rejected(two_shards, tmp_path):
    batches = Batches(two_shards, 2, 3, 200)
    starts(batches, 4)
    write_shard(tmp_path / "a_1.bin", np.arange(100, 113))
    with pytest.raises(DataError, match=r"a_1\.bin: the file has changed"):
        starts(batches, 1)


def test_no_matching_file_is_rejected(tmp_path):
    with pytest.raises(DataError, match=r"^--data .*\*\.bin: no file matches; run `llmc prepro` first"):
        Batches(str(tmp_path / "*.bin"), 1, 1, 10, option="--data")


def test_shard_smaller_than_a_batch_is_rejected(two_shards):
    with pytest.raises(DataError, match=r"found 14 tokens, expected at least 17 for a batch of 2 x 8"):
        Batches(two_shards, 2, 8, 200)


def test_fingerprint_depends_on_the_data_only(two_shards, tmp_path):
    first = Batches(two_shards, 2, 3, 200).fingerprint()
    assert first == Batches(two_shards, 1, 2, 200).fingerprint()
    write_shard(tmp_path / "a_1.bin", np.arange(100, 115))
    assert first != Batches(two_shards, 2, 3, 200).fingerprint()
