import importlib.resources
import itertools
import json

import numpy as np
import pytest
import tokenizers
from support.text_tokenizers import byte_tokenizer, gpt2_tokenizer

from llmc_cli.errors import DataError
from llmc_cli.tokenizer.huggingface import token_to_text
from llmc_cli.tokenizer.tokenizer import load_tokenizer


def last_merge(token, ranks):
    """Return the two tokens that BPE merges last to form ``token``."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


@pytest.fixture(scope="module")
def gpt2_json(tmp_path_factory):
    """A folder with GPT-2's tokenizer.json, whose merges are derived from the bytes of the ids."""
    gpt2 = gpt2_tokenizer()
    ranks = {token: id for id, token in enumerate(gpt2.tokens[:50256])}
    merges = [tuple(map(token_to_text, last_merge(token, ranks))) for token in gpt2.tokens[256:50256]]
    rust = tokenizers.Tokenizer(
        tokenizers.models.BPE({token_to_text(token): id for token, id in ranks.items()}, merges)
    )
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("gpt2")
    rust.save(str(folder / "tokenizer.json"))
    return folder


def test_gpt2_json_equals_bundled_tokenizer(gpt2_json):
    gpt2, loaded = gpt2_tokenizer(), load_tokenizer(str(gpt2_json))
    text = (importlib.resources.files("llmc_cli.assets") / "shakespeare.txt").read_text("utf-8")[:300_000]
    text += "\u00e9\u0301 naïve — 的的 🙂🙂 \u00a0\u3000x\t\r\n  \n 12345 it's WE'LL <|endoftext|> \x00\x7f"
    np.testing.assert_array_equal(loaded.encode(text), gpt2.encode(text))
    assert (loaded.tokens, loaded.end_of_text, loaded.special) == (gpt2.tokens, gpt2.end_of_text, gpt2.special)
    assert load_tokenizer(str(gpt2_json / "tokenizer.json")).encode("Hello world").tolist() == [15496, 995]


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_end_of_text_found_by_name(tmp_path, name):
    byte_tokenizer(specials=["<pad>", name]).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.end_of_text, tokenizer.special) == (257, {256, 257})
    assert tokenizer.encode("é<pad>").tolist() == [0xC3, 0xA9, *b"<pad>"]
    assert tokenizer.tokens[0x20] == b" " and tokenizer.tokens[256] == b"<pad>"


@pytest.mark.parametrize("eos", ["<pad>", {"content": "<pad>", "special": True}])
def test_end_of_text_from_tokenizer_config(tmp_path, eos):
    byte_tokenizer(specials=["</s>", "<pad>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(str(tmp_path)).end_of_text == 257


def test_missing_end_of_text_is_rejected(tmp_path):
    byte_tokenizer(specials=["<pad>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"no end-of-text token, expected one of <\|endoftext\|>, "):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not a usable JSON object"):
        load_tokenizer(str(tmp_path))


def test_byte_level_decoder_in_a_sequence(tmp_path):
    decoders = tokenizers.decoders
    byte_tokenizer(decoders.Sequence([decoders.ByteLevel()])).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).vocab_size == 257


def test_other_decoders_are_rejected(tmp_path):
    byte_tokenizer(tokenizers.decoders.WordPiece()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"found decoder \['WordPiece'\], expected ByteLevel"):
        load_tokenizer(str(tmp_path))


def test_token_that_spells_no_bytes_is_rejected(tmp_path):
    byte_tokenizer(vocab={"的": 0}).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="does not represent a byte"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"{"])
def test_damaged_file_is_rejected(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer\.json: not a usable tokenizer\.json"):
        load_tokenizer(str(tmp_path))
