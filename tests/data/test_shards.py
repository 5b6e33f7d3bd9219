import contextlib
import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crashing_worker import crash

from llmc_cli.data import encoding, shards
from llmc_cli.data.documents import Piece
from llmc_cli.data.encoding import encode_batch, encoded
from llmc_cli.data.shards import ShardPlan, shard_kind, write_token_files
from llmc_cli.data.tinyshakespeare import shakespeare_sections, shakespeare_text
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.shard import read_headerless, read_shard
from llmc_cli.tokenizer.base import Tokenizer
from llmc_cli.tokenizer.tokenizer import load_tokenizer, write_tokenizer_table


class Letters(Tokenizer):
    """One id a character, a = 1, …; 0 before each document."""

    def __init__(self, vocab_size=27):
        super().__init__("letters", (b"\0",) * vocab_size, 0, frozenset((0,)))

    def encode(self, text):
        return np.array([ord(char) - ord("a") + 1 for char in text], np.int32)


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 5000)


def documents(*texts):
    return [Piece(text, True) for text in texts]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tokens(result, split):
    return [int(token) for file in result.files if file.split == split for token in read_shard(file.path).tokens]


def test_end_of_text_stands_before_each_document():
    pieces = [Piece("ab", True), Piece("c", False), Piece("", True), Piece("d", True)]
    assert encode_batch(Letters(), pieces).tolist() == [0, 1, 2, 3, 0, 0, 4]


def test_two_files(tmp_path):
    result = write_token_files(documents("abc", "de"), Letters(), ShardPlan(tmp_path / "out", "x", val_tokens=3))
    assert [(file.path.name, file.split, file.tokens, file.bytes) for file in result.files] == [
        ("x_val.bin", "val", 3, 1030),
        ("x_train.bin", "train", 4, 1032),
    ]
    assert (tokens(result, "val"), tokens(result, "train")) == ([0, 1, 2], [3, 0, 4, 5])
    assert names(tmp_path / "out") == ["x_train.bin", "x_val.bin"]
    assert (result.tokens, result.removed) == (7, ())


def test_no_validation(tmp_path):
    result = write_token_files(documents("abc"), Letters(), ShardPlan(tmp_path, "x", val_tokens=0))
    assert names(tmp_path) == ["x_train.bin"]
    assert tokens(result, "train") == [0, 1, 2, 3]


def test_several_shards(tmp_path):
    plan = ShardPlan(tmp_path, "x", shard_tokens=3, val_tokens=2)
    result = write_token_files(documents("abcdefgh"), Letters(), plan)
    assert [(file.path.name, read_shard(file.path).tokens.tolist()) for file in result.files] == [
        ("x_val_000000.bin", [0, 1]),
        ("x_train_000001.bin", [2, 3, 4]),
        ("x_train_000002.bin", [5, 6, 7]),
        ("x_train_000003.bin", [8]),
    ]


def test_a_full_shard_is_not_followed_by_an_empty_one(tmp_path):
    write_token_files(documents("abcde"), Letters(), ShardPlan(tmp_path, "x", shard_tokens=5, val_tokens=1))
    assert names(tmp_path) == ["x_train.bin", "x_val.bin"]


@pytest.mark.parametrize(("letters", "val"), [(0, 0), (8, 0), (9, 1), (99, 10), (299, 20), (5000, 20)])
def test_validation_of_a_short_text(tmp_path, monkeypatch, letters, val):
    """Without a number: VAL_TOKENS, here 20, or a tenth of a text that is not ten times as long."""
    monkeypatch.setattr(shards, "VAL_TOKENS", 20)
    monkeypatch.setattr(encoding, "BATCH", 7)
    result = write_token_files(documents("a" * letters), Letters(), ShardPlan(tmp_path, "x"))
    assert len(tokens(result, "val")) == val
    assert len(tokens(result, "train")) == letters + 1 - val


@settings(max_examples=30, deadline=None)  # each file is flushed to disk
@given(
    texts=st.lists(st.text("abc", max_size=12), min_size=1, max_size=6),
    val=st.integers(0, 30),
    shard=st.integers(5, 30),
    batch=st.integers(1, 20),
)
def test_no_token_is_lost(tmp_path_factory, texts, val, shard, batch):
    everything = encode_batch(Letters(), documents(*texts)).tolist()
    val = min(val, shard, len(everything) - 1)
    folder = tmp_path_factory.mktemp("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH", batch)
        plan = ShardPlan(folder, "x", shard_tokens=shard, val_tokens=val)
        result = write_token_files(documents(*texts), Letters(), plan)
    assert tokens(result, "val") == everything[:val]
    assert tokens(result, "train") == everything[val:]
    assert all(file.tokens == shard for file in result.files[1:-1])


def test_headerless(tmp_path):
    plan = ShardPlan(tmp_path, "x", headerless=True, val_tokens=1)
    write_token_files(documents("abc"), Letters(), plan)
    assert (tmp_path / "x_train.bin").read_bytes() == np.array([1, 2, 3], "<i4").tobytes()
    assert read_headerless(tmp_path / "x_val.bin", 27).tokens.tolist() == [0]


def test_large_vocabularies_take_wide_shards(tmp_path):
    assert shard_kind(Letters(65_536)) is Kind.SHARD_GPT2
    assert shard_kind(Letters(65_537)) is Kind.SHARD_LLAMA3
    result = write_token_files(documents("abc"), Letters(65_537), ShardPlan(tmp_path, "x", val_tokens=0))
    shard = read_shard(result.files[0].path)
    assert (shard.kind, shard.tokens.dtype, shard.tokens.tolist()) == (Kind.SHARD_LLAMA3, np.uint32, [0, 1, 2, 3])


@pytest.mark.parametrize("shard_tokens", [0, -1, 2**31])
def test_impossible_shards(tmp_path, shard_tokens):
    with pytest.raises(UsageError, match="expected 1 to 2,147,483,647"):
        write_token_files(documents("a"), Letters(), ShardPlan(tmp_path, "x", shard_tokens=shard_tokens))


@pytest.mark.parametrize("val_tokens", [-1, 11])
def test_impossible_validation(tmp_path, val_tokens):
    plan = ShardPlan(tmp_path, "x", shard_tokens=10, val_tokens=val_tokens)
    with pytest.raises(UsageError, match="expected 0 to the 10 of a shard"):
        write_token_files(documents("a"), Letters(), plan)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(DataError, match="gives 4 tokens, of which 4 for validation leave nothing"):
        write_token_files(documents("abc"), Letters(), ShardPlan(tmp_path / "out", "x", val_tokens=4))
    with pytest.raises(DataError, match="there is no text"):
        write_token_files([], Letters(), ShardPlan(tmp_path / "out", "x"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_encode(gpt2, tmp_path):
    write_tokenizer_table(tmp_path / "t.bin", gpt2)
    with pytest.raises(UsageError, match="can only decode"):
        write_token_files(documents("a"), load_tokenizer(str(tmp_path / "t.bin")), ShardPlan(tmp_path / "out", "x"))
    assert not (tmp_path / "out").exists()


# earlier files


def test_shards_of_an_earlier_run_go(tmp_path):
    plan = ShardPlan(tmp_path, "x", shard_tokens=3, val_tokens=2)
    write_token_files(documents("abcdefgh"), Letters(), plan)
    for other in ("y_train_000001.bin", "x_train_0001.bin", "x_train_000001.bin.bak", "ax_train_000001.bin"):
        (tmp_path / other).touch()
    result = write_token_files(documents("abcde"), Letters(), plan)
    assert [path.name for path in result.removed] == ["x_train_000003.bin"]
    result = write_token_files(documents("abc"), Letters(), plan)
    assert [path.name for path in result.removed] == ["x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"]
    assert names(tmp_path) == [
        "ax_train_000001.bin", "x_train.bin", "x_train_000001.bin.bak", "x_train_0001.bin", "x_val.bin",
        "y_train_000001.bin",
    ]  # fmt: skip


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 1)
    plan = ShardPlan(tmp_path, "x", shard_tokens=3, val_tokens=2)
    write_token_files(documents("abcdefgh"), Letters(), plan)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def failing():
        yield from documents("ab", "cd", "ef", "gh")
        raise DataError("line 5")

    with pytest.raises(DataError, match="line 5"):
        write_token_files(failing(), Letters(), plan)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# exact bytes


def test_the_bundled_text_is_exact(gpt2, tmp_path):
    pieces = shakespeare_sections(shakespeare_text("bundled").text)
    result = write_token_files(pieces, gpt2, ShardPlan(tmp_path, "tiny_shakespeare", val_tokens=32_768))
    assert facts(result) == [
        (32_768, 66_560, "6e5f41cfec68c335d8e21c60b08f8a1b18067ff093dca13a42b057e539203918"),
        (278_335, 557_694, "b25cda792eac0e061deef03fd21203423e40a6b116744a1c53cd8425c6e44b4c"),
    ]


@pytest.mark.skipif("LLMC_TINYSHAKESPEARE" not in os.environ, reason="LLMC_TINYSHAKESPEARE names no original text")
def test_the_original_is_exact(gpt2, tmp_path):
    pieces = shakespeare_sections(shakespeare_text(os.environ["LLMC_TINYSHAKESPEARE"]).text)
    result = write_token_files(pieces, gpt2, ShardPlan(tmp_path, "tiny_shakespeare", val_tokens=32_768))
    assert facts(result) == [
        (32_768, 66_560, "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62"),
        (305_260, 611_544, "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8"),
    ]


def facts(result):
    return [(file.tokens, file.bytes, hashlib.sha256(file.path.read_bytes()).hexdigest()) for file in result.files]


# workers


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_files_do_not_depend_on_the_workers(gpt2, tmp_path, small_batches, workers):
    text = shakespeare_text("bundled").text[:60_000]
    plan = ShardPlan(tmp_path, "x", shard_tokens=5000, val_tokens=1000, workers=workers)
    result = write_token_files(shakespeare_sections(text), gpt2, plan)
    expected = encode_batch(gpt2, list(shakespeare_sections(text))).tolist()
    assert tokens(result, "val") + tokens(result, "train") == expected
    assert len(result.files) == 1 + -(-(len(expected) - 1000) // 5000)


def test_one_batch_starts_no_process(gpt2, monkeypatch):
    monkeypatch.setattr(encoding, "_Lane", None)
    assert len(list(encoded(iter([documents("a")]), gpt2, 8))) == 1
    assert list(encoded(iter([]), gpt2, 8)) == []


def test_memory_is_bounded(gpt2):
    """However many batches there are, only one a worker, and the next one, are taken before their ids are asked for."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield documents(f"batch {taken}")

    with encoder(endless(), gpt2, 2) as arrays:
        for given_out in range(1, 8):
            assert gpt2.decode_bytes(next(arrays).tolist()) == f"<|endoftext|>batch {given_out}".encode()
            assert taken <= given_out + 2


def encoder(batches, tokenizer, workers):
    return contextlib.closing(encoded(batches, tokenizer, workers))


def test_a_worker_that_dies(gpt2, tmp_path, monkeypatch, small_batches):
    monkeypatch.setattr(encoding, "_serve", crash)
    plan = ShardPlan(tmp_path / "out", "x", workers=2)
    with pytest.raises(MissingError, match=r"a worker ended with exit code 7 while it encoded.*try fewer --workers"):
        write_token_files(documents("a" * 5000, "b" * 5000, "c" * 5000), gpt2, plan)
    assert not (tmp_path / "out").exists()


def test_a_worker_that_is_dead_already(gpt2):
    lane = encoding._Lane("gpt2")
    lane._process.kill()
    lane._process.join()
    with pytest.raises(MissingError, match="a worker ended with exit code"):
        lane.send(documents("a" * 1_000_000))
    lane.stop()


def test_a_fault_in_a_worker(gpt2):
    faulty = [Piece(None, True)]
    with pytest.raises(RuntimeError, match="TypeError"), encoder(iter([faulty, faulty]), gpt2, 2) as arrays:
        next(arrays)
