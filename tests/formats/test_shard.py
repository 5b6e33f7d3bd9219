"""Token files: shards of both kinds, and headerless files."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc_cli.formats import shard, stream
from llmc_cli.formats.errors import MagicError, RangeError, SizeError, VersionError
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.shard import ShardHeader, ShardWriter, read_shard, write_shard

in_tmp_path = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
GPT2 = struct.pack("<256i", 20240520, 1, 3, *[0] * 253) + struct.pack("<3H", 50256, 0, 65535)
LLAMA3 = struct.pack("<256i", 20240801, 7, 2, *[0] * 253) + struct.pack("<2I", 128000, 2**32 - 1)
HEADERLESS = struct.pack("<3i", 50256, 0, 7)


@pytest.mark.parametrize(
    ("kind", "tokens", "content"),
    [
        (Kind.SHARD_GPT2, [50256, 0, 65535], GPT2),
        (Kind.SHARD_LLAMA3, [128000, 2**32 - 1], LLAMA3),
        (Kind.HEADERLESS, [50256, 0, 7], HEADERLESS),
    ],
)
def test_golden_bytes(tmp_path, kind, tokens, content):
    write_shard(tmp_path / "f", tokens, kind)
    assert (tmp_path / "f").read_bytes() == content
    if kind is not Kind.HEADERLESS:
        found = read_shard(tmp_path / "f")
        assert found.tokens.tolist() == tokens
        assert found.kind is kind
        assert not found.tokens.flags.writeable


def test_header_and_dtypes(tmp_path):
    (tmp_path / "g").write_bytes(GPT2)
    (tmp_path / "l").write_bytes(LLAMA3)
    assert read_shard(tmp_path / "g").header == ShardHeader(20240520, 1, 3)
    assert read_shard(tmp_path / "g").tokens.dtype == np.uint16
    assert read_shard(tmp_path / "l").header == ShardHeader(20240801, 7, 2)
    assert read_shard(tmp_path / "l").tokens.dtype == np.uint32


@in_tmp_path
@given(
    pieces=st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=20), max_size=5),
    kind=st.sampled_from([*shard.SHARDS, Kind.HEADERLESS]),
)
def test_round_trip_in_several_writes(tmp_path, pieces, kind):
    with ShardWriter(tmp_path / "f", kind) as writer:
        for piece in pieces:
            writer.write(piece)
    tokens = [token for piece in pieces for token in piece]
    assert writer.count == len(tokens)
    if kind is Kind.HEADERLESS:
        assert np.fromfile(tmp_path / "f", "<i4").tolist() == tokens
    else:
        found = read_shard(tmp_path / "f")
        assert found.tokens.tolist() == tokens
        assert found.header.num_tokens == len(tokens)


def test_more_tokens_than_one_chunk(tmp_path):
    tokens = np.arange(stream.CHUNK + 5) % 50257
    write_shard(tmp_path / "f", tokens)
    found = read_shard(tmp_path / "f")
    assert np.array_equal(found.tokens, tokens)
    found.check(50257)


def test_failed_write_leaves_no_file(tmp_path):
    with pytest.raises(OSError, match="stop"), ShardWriter(tmp_path / "f") as writer:
        writer.write([1, 2])
        raise OSError("stop")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "token"),
    [
        (Kind.SHARD_GPT2, 65536),
        (Kind.SHARD_GPT2, -1),
        (Kind.SHARD_LLAMA3, 2**32),
        (Kind.HEADERLESS, 2**31),
        (Kind.HEADERLESS, -1),
    ],
)
def test_writing_ids_outside_the_dtype_is_rejected(tmp_path, kind, token):
    with pytest.raises(RangeError, match=f"token id {token}"):
        write_shard(tmp_path / "f", [0, token], kind)
    assert list(tmp_path.iterdir()) == []


def test_writing_floats_is_rejected(tmp_path):
    with pytest.raises(TypeError, match="integer token ids"):
        write_shard(tmp_path / "f", [0.5])


def test_writing_more_tokens_than_an_int32_count_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "MAX_TOKENS", 3)
    with pytest.raises(RangeError, match="token count = 4, expected 0 to 3"), ShardWriter(tmp_path / "f") as writer:
        writer.write([1, 2, 3])
        writer.write([4])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [GPT2, LLAMA3])
@pytest.mark.parametrize("change", [-1, 1, 2])
def test_truncated_and_oversized_files_are_rejected(tmp_path, content, change):
    (tmp_path / "f").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(SizeError):
        read_shard(tmp_path / "f")


def test_truncated_header_is_rejected(tmp_path):
    for size in (0, 3, 100):
        (tmp_path / "f").write_bytes(GPT2[:size])
        with pytest.raises(SizeError):
            read_shard(tmp_path / "f")


def test_other_kinds_and_versions_are_rejected(tmp_path):
    (tmp_path / "f.bin").write_bytes(HEADERLESS * 200)
    with pytest.raises(MagicError, match="headerless"):
        read_shard(tmp_path / "f.bin")
    (tmp_path / "f.bin").write_bytes(struct.pack("<256i", 20240522, *[0] * 255))
    with pytest.raises(MagicError, match="evaluation set"):
        read_shard(tmp_path / "f.bin")
    (tmp_path / "f.bin").write_bytes(struct.pack("<256i", 20240520, 2, *[0] * 254))
    with pytest.raises(VersionError):
        read_shard(tmp_path / "f.bin")


@pytest.mark.parametrize(("count", "error"), [(-1, RangeError), (-(2**31), RangeError), (2**31 - 1, SizeError)])
def test_invalid_counts_are_rejected_without_allocating(tmp_path, count, error):
    (tmp_path / "f").write_bytes(struct.pack("<256i", 20240520, 1, count, *[0] * 253))
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read_shard(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_check_reports_the_position_of_an_invalid_token_id(tmp_path):
    tokens = np.zeros(stream.CHUNK + 10, np.int64)
    tokens[stream.CHUNK + 3] = 50257
    write_shard(tmp_path / "f", tokens)
    read_shard(tmp_path / "f").check(50258)
    with pytest.raises(RangeError, match=rf"token id 50257 at tokens\[{stream.CHUNK + 3}\], expected 0 to 50256"):
        read_shard(tmp_path / "f").check(50257)
