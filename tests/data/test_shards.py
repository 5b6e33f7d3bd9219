import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.crashing_worker import crash
from support.text_tokenizers import LetterTokenizer, documents, gpt2_tokenizer

from llmc_cli.data import encoding, shards
from llmc_cli.data.encoding import encode_batch
from llmc_cli.data.shard_plan import ShardPlan
from llmc_cli.data.shards import shard_kind, write_token_files
from llmc_cli.data.tinyshakespeare import shakespeare_sections, shakespeare_text
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.shard import read_shard
from llmc_cli.tokenizer.tokenizer import load_tokenizer, write_tokenizer_table


@pytest.fixture
def gpt2():
    return gpt2_tokenizer()


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 5000)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tokens(result, split):
    return [int(token) for file in result.files if file.split == split for token in read_shard(file.path).tokens]


def test_validation_and_training_files(tmp_path):
    result = write_token_files(
        documents("abc", "de"), LetterTokenizer(), ShardPlan(tmp_path / "out", "x", val_tokens=3)
    )
    assert [(file.path.name, file.split, file.tokens, file.bytes) for file in result.files] == [
        ("x_val.bin", "val", 3, 1030),
        ("x_train.bin", "train", 4, 1032),
    ]
    assert (tokens(result, "val"), tokens(result, "train")) == ([0, 1, 2], [3, 0, 4, 5])
    assert names(tmp_path / "out") == ["x_train.bin", "x_val.bin"]
    assert (result.tokens, result.removed) == (7, ())


def test_zero_validation_tokens_give_no_file(tmp_path):
    result = write_token_files(documents("abc"), LetterTokenizer(), ShardPlan(tmp_path, "x", val_tokens=0))
    assert names(tmp_path) == ["x_train.bin"]
    assert tokens(result, "train") == [0, 1, 2, 3]


def test_training_shards_are_numbered(tmp_path):
    plan = ShardPlan(tmp_path, "x", shard_tokens=3, val_tokens=2)
    result = write_token_files(documents("abcdefgh"), LetterTokenizer(), plan)
    assert [(file.path.name, read_shard(file.path).tokens.tolist()) for file in result.files] == [
        ("x_val_000000.bin", [0, 1]),
        ("x_train_000001.bin", [2, 3, 4]),
        ("x_train_000002.bin", [5, 6, 7]),
        ("x_train_000003.bin", [8]),
    ]


def test_full_shard_is_not_followed_by_an_empty_one(tmp_path):
    write_token_files(documents("abcde"), LetterTokenizer(), ShardPlan(tmp_path, "x", shard_tokens=5, val_tokens=1))
    assert names(tmp_path) == ["x_train.bin", "x_val.bin"]


@pytest.mark.parametrize(("letters", "val"), [(0, 0), (8, 0), (9, 1), (99, 10), (299, 20), (5000, 20)])
def test_default_validation_tokens(tmp_path, monkeypatch, letters, val):
    """The default is VAL_TOKENS, here 20, or a tenth of a text that is shorter than ten times VAL_TOKENS."""
    monkeypatch.setattr(shards, "VAL_TOKENS", 20)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 7)
    result = write_token_files(documents("a" * letters), LetterTokenizer(), ShardPlan(tmp_path, "x"))
    assert len(tokens(result, "val")) == val
    assert len(tokens(result, "train")) == letters + 1 - val


@settings(max_examples=30, deadline=None)  # slow: each file is flushed to disk
@given(
    texts=st.lists(st.text("abc", max_size=12), min_size=1, max_size=6),
    val=st.integers(0, 30),
    shard=st.integers(5, 30),
    batch=st.integers(1, 20),
)
def test_files_contain_all_tokens_in_order(tmp_path_factory, texts, val, shard, batch):
    expected = encode_batch(LetterTokenizer(), documents(*texts)).tolist()
    val = min(val, shard, len(expected) - 1)
    folder = tmp_path_factory.mktemp("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BATCH_CHARACTERS", batch)
        plan = ShardPlan(folder, "x", shard_tokens=shard, val_tokens=val)
        result = write_token_files(documents(*texts), LetterTokenizer(), plan)
    assert tokens(result, "val") == expected[:val]
    assert tokens(result, "train") == expected[val:]
    assert all(file.tokens == shard for file in result.files[1:-1])


def test_headerless_files(tmp_path):
    plan = ShardPlan(tmp_path, "x", headerless=True, val_tokens=1)
    write_token_files(documents("abc"), LetterTokenizer(), plan)
    assert (tmp_path / "x_train.bin").read_bytes() == np.array([1, 2, 3], "<i4").tobytes()
    assert (tmp_path / "x_val.bin").read_bytes() == np.array([0], "<i4").tobytes()


def test_large_vocabularies_use_uint32_shards(tmp_path):
    assert shard_kind(LetterTokenizer(65_536)) is Kind.SHARD_GPT2
    assert shard_kind(LetterTokenizer(65_537)) is Kind.SHARD_LLAMA3
    result = write_token_files(documents("abc"), LetterTokenizer(65_537), ShardPlan(tmp_path, "x", val_tokens=0))
    shard = read_shard(result.files[0].path)
    assert (shard.kind, shard.tokens.dtype, shard.tokens.tolist()) == (Kind.SHARD_LLAMA3, np.uint32, [0, 1, 2, 3])


@pytest.mark.parametrize("shard_tokens", [0, -1, 2**31])
def test_shard_tokens_out_of_range_are_rejected(tmp_path, shard_tokens):
    with pytest.raises(UsageError, match="expected 1 to 2,147,483,647"):
        write_token_files(documents("a"), LetterTokenizer(), ShardPlan(tmp_path, "x", shard_tokens=shard_tokens))


@pytest.mark.parametrize("val_tokens", [-1, 11])
def test_validation_tokens_out_of_range_are_rejected(tmp_path, val_tokens):
    plan = ShardPlan(tmp_path, "x", shard_tokens=10, val_tokens=val_tokens)
    with pytest.raises(UsageError, match="expected 0 to 10"):
        write_token_files(documents("a"), LetterTokenizer(), plan)


def test_text_without_training_tokens_is_rejected(tmp_path):
    with pytest.raises(DataError, match="has 4 tokens; 4 validation tokens leave none for training"):
        write_token_files(documents("abc"), LetterTokenizer(), ShardPlan(tmp_path / "out", "x", val_tokens=4))
    with pytest.raises(DataError, match="there is no text"):
        write_token_files([], LetterTokenizer(), ShardPlan(tmp_path / "out", "x"))
    assert not (tmp_path / "out").exists()


def test_tokenizer_that_cannot_encode_is_rejected(gpt2, tmp_path):
    write_tokenizer_table(tmp_path / "t.bin", gpt2)
    with pytest.raises(UsageError, match="can only decode"):
        write_token_files(documents("a"), load_tokenizer(str(tmp_path / "t.bin")), ShardPlan(tmp_path / "out", "x"))
    assert not (tmp_path / "out").exists()


# earlier files


def test_other_shards_of_an_earlier_run_are_removed(tmp_path):
    plan = ShardPlan(tmp_path, "x", shard_tokens=3, val_tokens=2)
    write_token_files(documents("abcdefgh"), LetterTokenizer(), plan)
    for other in ("y_train_000001.bin", "x_train_0001.bin", "x_train_000001.bin.bak", "ax_train_000001.bin"):
        (tmp_path / other).touch()
    result = write_token_files(documents("abcde"), LetterTokenizer(), plan)
    assert [path.name for path in result.removed] == ["x_train_000003.bin"]
    result = write_token_files(documents("abc"), LetterTokenizer(), plan)
    assert [path.name for path in result.removed] == ["x_train_000001.bin", "x_train_000002.bin", "x_val_000000.bin"]
    assert names(tmp_path) == [
        "ax_train_000001.bin", "x_train.bin", "x_train_000001.bin.bak", "x_train_0001.bin", "x_val.bin",
        "y_train_000001.bin",
    ]  # fmt: skip


def test_failure_leaves_existing_files_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)
    plan = ShardPlan(tmp_path, "x", shard_tokens=3, val_tokens=2)
    write_token_files(documents("abcdefgh"), LetterTokenizer(), plan)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def failing():
        yield from documents("ab", "cd", "ef", "gh")
        raise DataError("line 5")

    with pytest.raises(DataError, match="line 5"):
        write_token_files(failing(), LetterTokenizer(), plan)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# exact bytes


def test_files_of_the_bundled_text_are_exact(gpt2, tmp_path):
    pieces = shakespeare_sections(shakespeare_text("bundled").text)
    result = write_token_files(pieces, gpt2, ShardPlan(tmp_path, "tiny_shakespeare", val_tokens=32_768))
    assert sizes_and_hashes(result) == [
        (32_768, 66_560, "6e5f41cfec68c335d8e21c60b08f8a1b18067ff093dca13a42b057e539203918"),
        (278_335, 557_694, "b25cda792eac0e061deef03fd21203423e40a6b116744a1c53cd8425c6e44b4c"),
    ]


@pytest.mark.skipif("LLMC_TINYSHAKESPEARE" not in os.environ, reason="needs the original text, as LLMC_TINYSHAKESPEARE")
def test_files_of_the_original_are_exact(gpt2, tmp_path):
    pieces = shakespeare_sections(shakespeare_text(os.environ["LLMC_TINYSHAKESPEARE"]).text)
    result = write_token_files(pieces, gpt2, ShardPlan(tmp_path, "tiny_shakespeare", val_tokens=32_768))
    assert sizes_and_hashes(result) == [
        (32_768, 66_560, "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62"),
        (305_260, 611_544, "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8"),
    ]


def sizes_and_hashes(result):
    return [(file.tokens, file.bytes, hashlib.sha256(file.path.read_bytes()).hexdigest()) for file in result.files]


# workers


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_files_do_not_depend_on_the_number_of_workers(gpt2, tmp_path, small_batches, workers):
    text = shakespeare_text("bundled").text[:60_000]
    plan = ShardPlan(tmp_path, "x", shard_tokens=5000, val_tokens=1000, workers=workers)
    result = write_token_files(shakespeare_sections(text), gpt2, plan)
    expected = encode_batch(gpt2, list(shakespeare_sections(text))).tolist()
    assert tokens(result, "val") + tokens(result, "train") == expected
    assert len(result.files) == 1 + -(-(len(expected) - 1000) // 5000)


def test_crash_of_a_worker_writes_no_files(gpt2, tmp_path, monkeypatch, small_batches):
    monkeypatch.setattr(encoding, "run_worker", crash)
    plan = ShardPlan(tmp_path / "out", "x", workers=2)
    with pytest.raises(MissingError, match=r"a worker process exited with code 7 .*try a smaller --workers"):
        write_token_files(documents("a" * 5000, "b" * 5000, "c" * 5000), gpt2, plan)
    assert not (tmp_path / "out").exists()
