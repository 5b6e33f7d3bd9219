import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_tokenizers import byte_tokenizer, gpt2_tokenizer

from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.errors import FormatError, MagicError
from llmc_cli.tokenizer import tokenizer as module
from llmc_cli.tokenizer.tokenizer import load_tokenizer, write_tokenizer_table


@pytest.fixture
def gpt2():
    return gpt2_tokenizer()


def test_gpt2_encodes_known_ids(gpt2):
    assert gpt2.encode("Hello, world! I'll see\n\n  you in 2024…").tolist() == [
        15496, 11, 995, 0, 314, 1183, 766, 628, 220, 345, 287, 48609, 1399,
    ]  # fmt: skip
    assert gpt2.encode("").tolist() == []
    assert gpt2.encode("a").dtype == np.int32
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.special) == (50257, 50256, {50256})


def test_special_tokens_in_text_are_encoded_as_text(gpt2):
    ids = gpt2.encode("a<|endoftext|>b").tolist()
    assert 50256 not in ids
    assert gpt2.decode_bytes(ids) == b"a<|endoftext|>b"


@settings(deadline=None)
@given(text=st.text())
def test_decode_inverts_encode(text):
    tokenizer = gpt2_tokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(text).tolist()) == text.encode()


@pytest.mark.parametrize("char", ["a", " ", "\n", "^", "1", "的"])
def test_long_runs_of_one_character(gpt2, char):
    ids = gpt2.encode(char * 200_000).tolist()
    assert gpt2.decode_bytes(ids).decode() == char * 200_000


def test_written_table_is_byte_exact(gpt2, tmp_path):
    expected = {
        1: "72c44782644dccc955e1b775d0d7552a594bbb54bfc6141e31373324d486956d",
        2: "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13",
    }
    for version, sha256 in expected.items():
        write_tokenizer_table(tmp_path / "t.bin", gpt2, version)
        content = (tmp_path / "t.bin").read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256
        assert len(content) == 372_108
    write_tokenizer_table(tmp_path / "default.bin", gpt2)
    assert hashlib.sha256((tmp_path / "default.bin").read_bytes()).hexdigest() == expected[2]


@pytest.mark.parametrize("version", [1, 2])
def test_table_decodes_but_cannot_encode(gpt2, tmp_path, version):
    write_tokenizer_table(tmp_path / "t.bin", gpt2, version)
    table = load_tokenizer(str(tmp_path / "t.bin"))
    assert table.decode_bytes([15496, 995]) == b"Hello world"
    assert (table.end_of_text, table.special, table.tokens) == (50256, {50256}, gpt2.tokens)
    with pytest.raises(UsageError, match="can only decode; to encode, give --tokenizer gpt2"):
        table.encode("a")


@pytest.mark.parametrize("bad", [-1, 50257, 1 << 40])
def test_id_outside_the_vocabulary_is_rejected(gpt2, bad):
    with pytest.raises(DataError, match=f"token id {bad} at position 12 is outside .* gpt2: expected 0 to 50256"):
        gpt2.decode_bytes([1, 2, bad], position=10)


def test_damaged_bundled_table_is_rejected(monkeypatch):
    monkeypatch.setattr(module, "GPT2_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"gpt2_tokenizer\.bin: found SHA-256 6f3abc21.*reinstall llmc"):
        load_tokenizer("gpt2")


def test_llama3_is_not_implemented():
    with pytest.raises(MissingError, match="not implemented yet"):
        load_tokenizer("llama3")


def test_missing_tokenizer_file_is_rejected(tmp_path):
    for name in ("nope", tmp_path / "nope.json", tmp_path):
        with pytest.raises(DataError, match="no such tokenizer; expected gpt2"):
            load_tokenizer(str(name))


def test_file_that_is_not_a_table_is_rejected(tmp_path):
    (tmp_path / "t.bin").write_bytes(bytes(2000))
    with pytest.raises(MagicError):
        load_tokenizer(str(tmp_path / "t.bin"))


def test_token_too_long_for_a_table_is_rejected(tmp_path):
    byte_tokenizer(specials=["</s>", "x" * 256]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError):
        write_tokenizer_table(tmp_path / "t.bin", load_tokenizer(str(tmp_path)))


def test_gpt2_needs_neither_network_nor_cache(tmp_path):
    """Loading opens no socket and does not use tiktoken's own loader, registry or cache."""
    program = (
        "import socket, sys\n"
        "socket.socket.connect = socket.getaddrinfo = None\n"
        "from llmc_cli.tokenizer.tokenizer import load_tokenizer\n"
        "assert load_tokenizer('gpt2').encode('Hello world').tolist() == [15496, 995]\n"
        "assert not {'tiktoken_ext.openai_public', 'requests', 'tokenizers', 'urllib3'} & set(sys.modules)\n"
    )
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=environment)
    assert not list(tmp_path.iterdir())
