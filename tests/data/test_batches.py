import os

import numpy as np
import pytest

from llmc_cli.data.batches import Batches
from llmc_cli.errors import DataError
from llmc_cli.formats.shard import write_shard
from llmc_cli.rng import MersenneTwister


@pytest.fixture
def two_shards(tmp_path):
    """Shards of 25 and 14 tokens: 4 and 2 samples at B·T = 6."""
    write_shard(tmp_path / "a_0.bin", np.arange(25))
    write_shard(tmp_path / "a_1.bin", np.arange(100, 114))
    return str(tmp_path / "a_*.bin")


def starts(batches, count):
    """The first token of each of the next samples."""
    seen = []
    for _ in range(count):
        batches.next()
        seen.append(int(batches.inputs[0, 0]))
    return seen


def test_in_order(two_shards):
    batches = Batches(two_shards, 2, 3, 200)
    assert starts(batches, 6) == [0, 6, 12, 18, 100, 106]
    assert starts(batches, 1) == [0]


def test_inputs_and_targets(two_shards):
    batches = Batches(two_shards, 2, 3, 200)
    batches.next()
    assert batches.inputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert batches.targets.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batches.inputs.dtype == batches.targets.dtype == np.int32
    assert batches.inputs.flags.c_contiguous and batches.targets.flags.c_contiguous


def test_shuffled_as_the_c_trainer_does(two_shards):
    generator = MersenneTwister(42)
    shards = np.arange(2, dtype=np.int32)
    bases, counts = [0, 100], [4, 2]
    expected = []
    for _ in range(2):  # epochs; the shard order is permuted in place, again and again
        generator.permute(shards)
        for shard in shards:
            samples = np.arange(counts[shard], dtype=np.int32)
            generator.permute(samples)
            expected += [bases[shard] + 6 * int(sample) for sample in samples]
    assert starts(Batches(two_shards, 2, 3, 200, shuffle=True), 12) == expected


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("after", range(8))
def test_position_goes_on(two_shards, shuffle, after):
    batches = Batches(two_shards, 2, 3, 200, shuffle=shuffle)
    starts(batches, after)
    position = batches.position
    expected = starts(batches, 20)
    other = Batches(two_shards, 2, 3, 200, shuffle=shuffle)
    assert other.accepts(position)
    other.position = position
    assert starts(other, 20) == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_looking_ahead_changes_nothing(two_shards, shuffle):
    expected = starts(Batches(two_shards, 2, 3, 200, shuffle=shuffle), 40)
    batches, found, seen = Batches(two_shards, 2, 3, 200, shuffle=shuffle), [], 0
    for turn in range(40):
        batches.next()
        inputs, targets, position = batches.inputs, batches.targets, batches.position
        kept = inputs.tolist(), targets.tolist()
        ahead = batches.look_ahead() if turn % 3 else None
        assert (inputs.tolist(), targets.tolist()) == kept
        assert str(batches.position) == str(position)
        found.append(kept[0][0][0])
        if ahead is not None:
            seen += 1
            assert int(ahead[0][0, 0]) == expected[(turn + 1) % 40] or turn == 39
    assert found == expected
    assert seen >= 15


def test_what_was_read_ahead_is_given_as_it_is(two_shards):
    batches = Batches(two_shards, 2, 3, 200)
    batches.next()
    inputs, targets = batches.look_ahead()
    batches.next()
    assert batches.inputs is inputs and batches.targets is targets
    assert (inputs[0, 0], targets[0, 0]) == (6, 7)


@pytest.mark.parametrize("shuffle", [False, True])
def test_going_elsewhere_after_looking_ahead(two_shards, shuffle):
    batches = Batches(two_shards, 2, 3, 200, shuffle=shuffle)
    position = batches.position
    expected = starts(batches, 3)
    batches.look_ahead()
    batches.position = position
    assert starts(batches, 3) == expected
    if not shuffle:
        batches.look_ahead()
        batches.rewind()
        assert starts(batches, 3) == expected


def test_a_bad_token_ahead_is_refused_in_its_turn(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([0, 1, 2, 3, 4, 99, 6]))
    batches = Batches(str(tmp_path / "a.bin"), 1, 3, 50)
    batches.next()
    assert batches.look_ahead() is None
    with pytest.raises(DataError, match="token 99 at position 5"):
        batches.next()


def test_position_of_other_data_is_not_accepted(two_shards):
    position = Batches(two_shards, 2, 3, 200, shuffle=True).position
    assert not Batches(two_shards, 1, 3, 200, shuffle=True).accepts(position)
    assert not Batches(two_shards, 2, 3, 200).accepts(position)
    assert not Batches(two_shards.replace("*", "0"), 2, 3, 200, shuffle=True).accepts(position)


def test_a_position_does_not_move_with_its_batches(two_shards):
    batches = Batches(two_shards, 2, 3, 200, shuffle=True)
    position = batches.position
    before = position.sample_order.copy()
    starts(batches, 7)
    np.testing.assert_array_equal(position.sample_order, before)


def test_counts(two_shards):
    batches = Batches(two_shards, 2, 3, 200)
    assert (batches.num_tokens, batches.num_samples) == (39, 6)


def test_token_outside_the_vocabulary(two_shards):
    batches = Batches(two_shards, 2, 3, 110)
    starts(batches, 5)
    with pytest.raises(DataError, match=r"a_1.bin: token 112 at position 12"):
        batches.next()


def test_a_name_that_would_be_a_glob(tmp_path):
    write_shard(tmp_path / "run [1]" / "a.bin", np.arange(25))
    assert starts(Batches(str(tmp_path / "run [1]" / "a.bin"), 2, 3, 200), 2) == [0, 6]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("shuffle", [False, True])
def test_more_shards_than_files_may_be_open(tmp_path, shuffle):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(80):
        write_shard(tmp_path / f"a_{number:03d}.bin", np.arange(7))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        batches = Batches(str(tmp_path / "*.bin"), 2, 3, 200, shuffle=shuffle)
        starts(batches, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_shard_that_changes_meanwhile(two_shards, tmp_path):
    batches = Batches(two_shards, 2, 3, 200)
    starts(batches, 4)
    write_shard(tmp_path / "a_1.bin", np.arange(100, 113))
    with pytest.raises(DataError, match=r"a_1\.bin: it has changed"):
        starts(batches, 1)


def test_no_files(tmp_path):
    with pytest.raises(DataError, match="llmc prepro"):
        Batches(str(tmp_path / "*.bin"), 1, 1, 10)


def test_shard_smaller_than_a_batch(two_shards):
    with pytest.raises(DataError, match=r"14 tokens, where a batch of 2 x 8 takes 17"):
        Batches(two_shards, 2, 8, 200)


def test_fingerprint_knows_the_data(two_shards, tmp_path):
    first = Batches(two_shards, 2, 3, 200).fingerprint()
    assert first == Batches(two_shards, 1, 2, 200).fingerprint()
    write_shard(tmp_path / "a_1.bin", np.arange(100, 115))
    assert first != Batches(two_shards, 2, 3, 200).fingerprint()
