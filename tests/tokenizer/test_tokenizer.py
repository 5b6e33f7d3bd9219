import hashlib
import importlib.resources
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.errors import FormatError, MagicError
from llmc_cli.formats.vocabulary import write_vocabulary
from llmc_cli.tokenizer import tokenizer as module
from llmc_cli.tokenizer.text_stream import TextStream
from llmc_cli.tokenizer.tokenizer import BYTE_OF_CHAR, load_tokenizer, write_tokenizer_table

CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def merged_from(token, ranks):
    """The two tokens that BPE merges into ``token`` last."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


@pytest.fixture(scope="module")
def gpt2_json(gpt2, tmp_path_factory):
    """The folder of a tokenizer.json of GPT-2, its merges found from the bytes of the ids alone."""
    ranks = {token: id for id, token in enumerate(gpt2.tokens[:50256])}
    spelled = ["".join(CHAR_OF_BYTE[byte] for byte in token) for token in ranks]
    merges = [
        tuple("".join(CHAR_OF_BYTE[byte] for byte in part) for part in merged_from(token, ranks))
        for token in gpt2.tokens[256:50256]
    ]
    rust = tokenizers.Tokenizer(tokenizers.models.BPE({text: id for id, text in enumerate(spelled)}, merges))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("gpt2")
    rust.save(str(folder / "tokenizer.json"))
    return folder


def test_known_ids(gpt2):
    assert gpt2.encode("Hello, world! I'll see\n\n  you in 2024…").tolist() == [
        15496, 11, 995, 0, 314, 1183, 766, 628, 220, 345, 287, 48609, 1399,
    ]  # fmt: skip
    assert gpt2.encode("").tolist() == []
    assert gpt2.encode("a").dtype == np.int32
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.special) == (50257, 50256, {50256})


def test_special_tokens_in_text_are_text(gpt2):
    ids = gpt2.encode("a<|endoftext|>b").tolist()
    assert 50256 not in ids
    assert gpt2.decode_bytes(ids) == b"a<|endoftext|>b"


@settings(deadline=None)
@given(text=st.text())
def test_round_trip(text):
    tokenizer = load_once()
    assert tokenizer.decode_bytes(tokenizer.encode(text).tolist()) == text.encode()


def load_once(loaded=[]):  # noqa: B006 (hypothesis cannot take the fixture)
    if not loaded:
        loaded.append(load_tokenizer("gpt2"))
    return loaded[0]


@pytest.mark.parametrize("char", ["a", " ", "\n", "^", "1", "的"])
def test_long_runs_of_one_character(gpt2, char):
    ids = gpt2.encode(char * 200_000).tolist()
    assert gpt2.decode_bytes(ids).decode() == char * 200_000


def test_the_tokenizers_library_agrees(gpt2, gpt2_json):
    ours = load_tokenizer(str(gpt2_json))
    text = (importlib.resources.files("llmc_cli.assets") / "shakespeare.txt").read_text("utf-8")[:300_000]
    text += "\u00e9\u0301 naïve — 的的 🙂🙂 \u00a0\u3000x\t\r\n  \n 12345 it's WE'LL <|endoftext|> \x00\x7f"
    np.testing.assert_array_equal(ours.encode(text), gpt2.encode(text))
    assert (ours.tokens, ours.end_of_text, ours.special) == (gpt2.tokens, gpt2.end_of_text, gpt2.special)
    assert load_tokenizer(str(gpt2_json / "tokenizer.json")).encode("Hello world").tolist() == [15496, 995]


def test_the_table_is_exact(gpt2, tmp_path):
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
def test_a_table_decodes_only(gpt2, tmp_path, version):
    write_tokenizer_table(tmp_path / "t.bin", gpt2, version)
    table = load_tokenizer(str(tmp_path / "t.bin"))
    assert table.decode_bytes([15496, 995]) == b"Hello world"
    assert (table.end_of_text, table.special, table.tokens) == (50256, {50256}, gpt2.tokens)
    with pytest.raises(UsageError, match="can decode, not encode; give --tokenizer gpt2"):
        table.encode("a")


@pytest.mark.parametrize("bad", [-1, 50257, 1 << 40])
def test_an_id_outside_the_vocabulary(gpt2, bad):
    with pytest.raises(DataError, match=f"token id {bad} at position 12 is outside .* gpt2: expected 0 to 50256"):
        gpt2.decode_bytes([1, 2, bad], position=10)


def test_damaged_asset(monkeypatch):
    monkeypatch.setattr(module, "GPT2_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"gpt2_tokenizer\.bin: found sha256 6f3abc21.*install llmc again"):
        load_tokenizer("gpt2")


def test_llama3_is_not_there_yet():
    with pytest.raises(MissingError, match="not yet"):
        load_tokenizer("llama3")


def test_no_such_tokenizer(tmp_path):
    for name in ("nope", tmp_path / "nope.json", tmp_path):
        with pytest.raises(DataError, match="no such tokenizer; expected gpt2"):
            load_tokenizer(str(name))


def test_not_a_table(tmp_path):
    (tmp_path / "t.bin").write_bytes(bytes(2000))
    with pytest.raises(MagicError):
        load_tokenizer(str(tmp_path / "t.bin"))


def small(decoder=None, specials=("<|endoftext|>",), vocab=None):
    """A byte-level tokenizer of the bytes alone."""
    vocab = vocab or dict(BYTE_OF_CHAR)
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoder or tokenizers.decoders.ByteLevel()
    rust.add_special_tokens(list(specials))
    return rust


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_end_of_text_by_name(tmp_path, name):
    small(specials=["<pad>", name]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.end_of_text, tokenizer.special) == (257, {256, 257})
    assert tokenizer.encode("é<pad>").tolist() == [0xC3, 0xA9, *b"<pad>"]
    assert tokenizer.tokens[0x20] == b" " and tokenizer.tokens[256] == b"<pad>"


@pytest.mark.parametrize("eos", ["<pad>", {"content": "<pad>", "special": True}])
def test_end_of_text_by_the_config(tmp_path, eos):
    small(specials=["</s>", "<pad>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(str(tmp_path)).end_of_text == 257


def test_end_of_text_not_found(tmp_path):
    small(specials=["<pad>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no end-of-text token, expected one of <\|endoftext\|>, "):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: found no usable JSON object"):
        load_tokenizer(str(tmp_path))


def test_a_decoder_inside_a_sequence(tmp_path):
    decoders = tokenizers.decoders
    small(decoders.Sequence([decoders.ByteLevel()])).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).vocab_size == 257


def test_not_byte_level(tmp_path):
    small(tokenizers.decoders.WordPiece()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"found decoder \['WordPiece'\], expected ByteLevel"):
        load_tokenizer(str(tmp_path))


def test_a_token_that_is_no_bytes(tmp_path):
    small(vocab={"的": 0}).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="stands for no byte"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"{"])
def test_damaged_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: found no usable tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_a_token_too_long_for_the_table(tmp_path):
    small(specials=["</s>", "x" * 256]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError):
        write_tokenizer_table(tmp_path / "t.bin", load_tokenizer(str(tmp_path)))


@settings(deadline=None)
@given(text=st.text(min_size=1), data=st.data())
def test_a_stream_of_text(text, data):
    """However the ids arrive, the text is the same, and no piece holds half a character."""
    tokenizer = load_once()
    ids = tokenizer.encode(text).tolist()
    stream, parts = TextStream(tokenizer), []
    while ids:
        count = data.draw(st.integers(1, len(ids)))
        parts.append(stream.feed(ids[:count]))
        ids = ids[count:]
    assert "".join(parts) + stream.finish() == text.encode().decode()


def test_a_stream_holds_back_half_a_character(gpt2):
    ids = gpt2.encode("🙂").tolist()
    assert len(ids) == 2
    stream = TextStream(gpt2)
    assert [stream.feed([id]) for id in ids] == ["", "🙂"]
    assert stream.feed(ids[:1]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.feed(gpt2.encode("a").tolist()) == "a"


def test_a_stream_and_special_tokens(gpt2):
    ids = [50256, 15496, 50256]
    assert TextStream(gpt2).feed(ids) == "Hello"
    assert TextStream(gpt2, show_special=True).feed(ids) == "<|endoftext|>Hello<|endoftext|>"


def test_a_stream_counts_positions(gpt2):
    stream = TextStream(gpt2, position=100)
    stream.feed([50256, 1, 2])
    with pytest.raises(DataError, match="token id 60000 at position 104 "):
        stream.feed([3, 60000])


def test_a_table_of_anything(tmp_path):
    write_vocabulary(tmp_path / "t.bin", [b"", b"\xff", b"ab"], 0)
    stream = TextStream(load_tokenizer(str(tmp_path / "t.bin")))
    assert stream.feed([2, 1, 2, 0]) == "ab\ufffdab"


def test_needs_neither_network_nor_cache(tmp_path):
    """No socket is opened, and tiktoken's own loader, registry and cache stay untouched."""
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
