"""The tokenizer of a converted model, written as a table or as files."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers
from support.converting import MODEL, convert

from llmc_cli.conversion.conversion import plan
from llmc_cli.conversion.targets import Request
from llmc_cli.data.tinyshakespeare import shakespeare_text
from llmc_cli.errors import DataError
from llmc_cli.formats.debug_state import read_debug_state
from llmc_cli.formats.safetensors import write_safetensors
from llmc_cli.formats.vocabulary import read_vocabulary
from llmc_cli.formats.weights import read_header
from llmc_cli.models import huggingface_config, huggingface_weights
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.layout import parameter_shapes
from llmc_cli.tokenizer.huggingface import merges, token_to_text
from llmc_cli.tokenizer.tokenizer import GPT2_SHA256, load_tokenizer


@pytest.fixture
def gpt2_vocab_folder(tmp_path):
    """A model folder with GPT-2's vocabulary and very small layers."""
    config = ModelConfig(64, 50257, 1, 1, 2)
    generator = np.random.default_rng(5)
    params = {name: generator.standard_normal(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    write_safetensors(tmp_path / "gpt2_vocab" / "model.safetensors", huggingface_weights.export(config, params))
    (tmp_path / "gpt2_vocab" / "config.json").write_text(json.dumps(huggingface_config.config_to_dict(config)))
    return tmp_path / "gpt2_vocab"


def test_gpt2_writes_four_files(tmp_path, gpt2_vocab_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmc_cli.downloads.hub.fetch_model", lambda repository, tokenizer, on_bytes: gpt2_vocab_folder)
    warnings = []
    conversion = plan(Request("gpt2", reference="numpy"), on_warning=warnings.append)
    files = list(conversion.run(lambda what, done, total: None))
    assert [str(file.path) for file in files] == [
        "gpt2_124M.bin",
        "gpt2_124M_bf16.bin",
        "gpt2_124M_debug_state.bin",
        "gpt2_tokenizer.bin",
    ]
    assert [read_header(file.path).version for file in files[:2]] == [3, 5]
    state = read_debug_state(files[2].path, read_header(files[0].path))
    assert state.x.shape == (4, 64)
    assert state.x[0, 0] == 50256  # the end-of-text token before a document
    assert "bundled text" in warnings[0]
    assert files[3].bytes == 372_108


def test_tokenizer_table_matches_llm_c(tmp_path, gpt2_vocab_folder):
    convert(gpt2_vocab_folder, tokenizer=tmp_path / "table.bin")
    assert hashlib.sha256((tmp_path / "table.bin").read_bytes()).hexdigest() == GPT2_SHA256


def test_folder_with_gpt2_vocabulary_gets_the_gpt2_tokenizer(tmp_path, gpt2_vocab_folder):
    convert(gpt2_vocab_folder, tmp_path / "model.bin")
    convert(tmp_path / "model.bin", tmp_path / "folder")
    tokenizer, loaded = load_tokenizer("gpt2"), load_tokenizer(str(tmp_path / "folder"))
    assert loaded.tokens == tokenizer.tokens
    assert loaded.end_of_text == tokenizer.end_of_text == 50256
    text = shakespeare_text("bundled").text[:20_000] + " \n\n\t 'twas naïve, 日本語 🙂 x1234y <|endoftext|> "
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    convert(tmp_path / "folder", tokenizer=tmp_path / "table.bin")
    assert hashlib.sha256((tmp_path / "table.bin").read_bytes()).hexdigest() == GPT2_SHA256


def test_merges_match_openai_vocab_bpe():
    """Compare with the hash of OpenAI's vocab.bpe, which has one merge per line."""
    lines = [f"{token_to_text(left)} {token_to_text(right)}\n" for left, right in merges(load_tokenizer("gpt2"))]
    text = "".join(["#version: 0.2\n", *lines])
    found = hashlib.sha256(text.encode()).hexdigest()
    assert found == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@pytest.fixture
def letters_folder(tiny_folder):
    """The tiny model's folder with a byte-level tokenizer.json."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:90]
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.add_special_tokens(["<|endoftext|>"])
    rust.save(str(tiny_folder / "tokenizer.json"))
    return tiny_folder


def test_own_tokenizer_is_copied(tmp_path, letters_folder):
    convert(letters_folder, tmp_path / "folder", tokenizer=tmp_path / "table.bin")
    assert (tmp_path / "folder" / "tokenizer.json").read_bytes() == (letters_folder / "tokenizer.json").read_bytes()
    table = read_vocabulary(tmp_path / "table.bin")
    assert (len(table.tokens), table.end_of_text) == (91, 90)


def test_invalid_tokenizers_are_rejected(tmp_path, letters_folder):
    with pytest.raises(DataError, match="found no tokenizer for a vocabulary of 97"):
        convert(MODEL, tokenizer=tmp_path / "table.bin")
    config = json.loads((letters_folder / "config.json").read_bytes())
    (letters_folder / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    with pytest.raises(DataError, match="91 tokens, expected at most 90"):
        convert(letters_folder, tokenizer=tmp_path / "table.bin")
    (letters_folder / "tokenizer.json").rename(letters_folder / "vocab.json")
    with pytest.raises(DataError, match=r"vocab\.json only"):
        convert(letters_folder, tokenizer=tmp_path / "table.bin")
    assert not (tmp_path / "table.bin").exists()


@pytest.mark.witness
def test_transformers_loads_the_tokenizer(tmp_path, gpt2_vocab_folder):
    from transformers import AutoTokenizer

    convert(gpt2_vocab_folder, tmp_path / "model.bin")
    convert(tmp_path / "model.bin", tmp_path / "folder")
    loaded, tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder"), load_tokenizer("gpt2")
    text = shakespeare_text("bundled").text[:200] + " \n\n\t 'twas naïve, 日本語 🙂 x1234y"
    assert loaded.encode(text) == tokenizer.encode(text).tolist()
    assert loaded.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert loaded.eos_token_id == 50256
