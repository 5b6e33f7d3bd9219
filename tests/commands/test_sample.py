"""`llmc sample`: its output, its errors, and agreement of `--ids` with `llmc decode`."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from support.paths import FIXTURES
from typer.testing import CliRunner

from llmc_cli.app import app
from llmc_cli.commands.render import Output
from llmc_cli.formats.vocabulary import write_vocabulary
from llmc_cli.formats.weights import GPT2Header, save_weights
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.arena import Arena
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.layout import parameter_shapes

TINY = FIXTURES / "sampling_model.bin"  # V 120, T 96
GOLDEN = json.loads((FIXTURES / "sampling_golden.json").read_text())[0]  # its prompt is one id
END_OF_TEXT = 50256


@pytest.fixture(autouse=True)
def reference_backend(monkeypatch):
    backend = SimpleNamespace(kernels=ReferenceKernels())
    monkeypatch.setattr(
        "llmc_cli.kernels.backend.open_sampling", lambda device, precision, threads, on_compile: backend
    )


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A model with GPT-2's vocabulary and random weights."""
    config = ModelConfig(max_seq_len=64, vocab_size=50257, num_layers=1, num_heads=2, channels=8)
    weights = Arena(np.zeros, parameter_shapes(config), np.float32)
    weights.flat[:] = np.random.default_rng(0).normal(0, 0.5, weights.flat.size)
    path = tmp_path_factory.mktemp("model") / "model.bin"
    save_weights(path, GPT2Header(20240326, 3, 64, 50257, 1, 2, 8, 50304), weights)
    return path


@pytest.fixture
def table(tmp_path):
    """Write a tokenizer table for TINY: single bytes, including the two of é, and pairs of letters."""

    def write(end_of_text=119):
        letters = [bytes([byte]) for byte in (*range(32, 127), 0xC3, 0xA9)]
        pairs = [bytes([97 + i, 98 + i]) for i in range(119 - len(letters))]
        path = tmp_path / "table.bin"
        write_vocabulary(path, (*letters, *pairs, b"<end>"), end_of_text, 2)
        return path

    return write


def llmc(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def stdout(*arguments, stdin=None):
    result = llmc(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout_bytes.decode()


def test_ids_equal_those_of_transformers():
    found = stdout("sample", TINY, "--prompt-ids", "7", "--ids", "--temperature", 0, "--max-tokens", 64)
    assert found == " ".join(map(str, GOLDEN["prompt"] + GOLDEN["ids"])) + "\n"


def test_text_goes_to_stdout_and_speed_to_stderr(gpt2):
    result = llmc("sample", gpt2, "Hello", "--max-tokens", 5)
    text = result.stdout_bytes.decode()
    assert text.startswith("Hello") and len(text) > 8 and text.endswith("\n") and not text.endswith("\n\n")
    assert result.stderr.startswith("5 tokens in ") and result.stderr.endswith(" tokens/s\n")
    assert llmc("sample", gpt2, "Hello", "--max-tokens", 5, "--quiet").stderr == ""
    assert stdout("sample", gpt2, "Hello", "--max-tokens", 5, "--no-echo") == text.removeprefix("Hello")


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["Hello"],
        ["Héllo wörld"],
        ["Hello", "--num", 3],
        ["Hello", "--no-echo"],
        ["Hello", "--temperature", 0, "--max-tokens", 9],
        ["Hello", "--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--seed", 9],
        ["--prompt-ids", "50256 15496 50256"],
        ["Hello", "--stop", "e", "--stop", "  "],
        ["Hello", "--num", 4, "--stop", "a"],
        ["Hello", "--seed", 3, "--stop", "er", "--no-echo"],
    ],
    ids=str,
)
def test_decoded_ids_equal_the_text(gpt2, options):
    ids = llmc("sample", gpt2, *options, "--ids")
    text = llmc("sample", gpt2, *options)
    assert text.exit_code == ids.exit_code == 0
    assert llmc("decode", stdin=ids.stdout_bytes).stdout_bytes == text.stdout_bytes != b""


@pytest.mark.parametrize("stop", ["a", "e", " ", "in", "th"])
def test_stop_string_ends_the_sample(gpt2, stop):
    whole = stdout("sample", gpt2, "Hello", "--no-echo").removesuffix("\n")
    found = stdout("sample", gpt2, "Hello", "--no-echo", "--stop", stop, "--stop", "not there").removesuffix("\n")
    assert found == whole.partition(stop)[0]


def test_stop_strings_across_tokens_and_characters(table):
    options = (TINY, "--prompt-ids", "7", "--tokenizer", table(), "--temperature", 0, "--no-echo")
    whole = stdout("sample", *options).removesuffix("\n")
    for start in range(0, 30, 3):
        stop = whole[start : start + 5]
        assert stdout("sample", *options, "--stop", stop) == whole.partition(stop)[0] + "\n"


def test_end_of_text_ends_the_sample(table):
    end = GOLDEN["ids"][6]
    count = GOLDEN["ids"].index(end)
    options = (TINY, "--prompt-ids", "7", "--tokenizer", table(end_of_text=end), "--temperature", 0)
    found = stdout("sample", *options, "--ids")
    assert found == " ".join(map(str, GOLDEN["prompt"] + GOLDEN["ids"][:count])) + "\n"
    assert json.loads(stdout("sample", *options, "--json"))["ending"] == "end-of-text"


def test_default_prompt_is_end_of_text(gpt2):
    ids = stdout("sample", gpt2, "--ids", "--max-tokens", 6)
    assert ids.split()[0] == str(END_OF_TEXT)
    assert ids == stdout("sample", gpt2, "", "--ids", "--max-tokens", 6)
    assert ids == stdout("sample", gpt2, "--prompt-ids", f" {END_OF_TEXT} ", "--ids", "--max-tokens", 6)


def test_prompt_from_stdin_is_not_modified(gpt2):
    found = stdout("sample", gpt2, "-", "--max-tokens", 3, stdin="Hello\n\né\n".encode())
    assert found.startswith("Hello\n\né\n")
    assert found == stdout("sample", gpt2, "Hello\n\né\n", "--max-tokens", 3)
    result = llmc("sample", gpt2, "-", stdin=b"\xff")
    assert result.exit_code == 3 and "not UTF-8" in result.stderr


def test_several_samples(gpt2):
    options = (gpt2, "Hello", "--max-tokens", 6)
    single = stdout("sample", *options)
    assert stdout("sample", *options, "--num", 3).startswith(single)
    lines = stdout("sample", *options, "--num", 3, "--ids").splitlines()
    assert len(set(lines)) == 3 and lines[:2] == stdout("sample", *options, "--num", 2, "--ids").splitlines()


def test_json(gpt2):
    lines = [json.loads(line) for line in stdout("sample", gpt2, "Hello", "--num", 2, "--json").splitlines()]
    assert [line["sample"] for line in lines] == [0, 1]
    first = lines[0]
    assert set(first) == {"schema", "sample", "prompt", "prompt_ids", "text", "ids", "ending"}
    assert (first["schema"], first["prompt"], first["prompt_ids"]) == (1, "Hello", [15496])
    assert (len(first["ids"]), first["ending"]) == (63, "length")
    assert stdout("sample", gpt2, "Hello", "--num", 2) == "".join(f"Hello{line['text']}\n" for line in lines)
    bare = json.loads(stdout("sample", gpt2, "Hello", "--json", "--ids", "--no-echo"))
    assert bare == {"schema": 1, "sample": 0, "ids": first["ids"], "ending": "length"}
    stopped = json.loads(stdout("sample", gpt2, "Hello", "--json", "--stop", "e"))
    assert stopped["ending"] == "stop" and "e" not in stopped["text"]


def test_text_streams(gpt2, monkeypatch):
    parts = []
    monkeypatch.setattr(Output, "write", lambda self, part: parts.append(part))
    llmc("sample", gpt2, "Hello", "--max-tokens", 6, "--temperature", 0)
    assert parts[0] == "Hello" and len(parts) == 7


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--max-tokens", 96, "--ids", "--prompt-ids", "1"], 2, "97 tokens, but the model's context holds 96"),
        (["--ids", "--prompt-ids", " ".join(["1"] * 96)], 2, "leave no room"),
        (["--ids", "--prompt-ids", "1 120"], 2, "token id 120 is outside the model's vocabulary, 0 to 119"),
        (["--ids", "--prompt-ids", "1 x"], 2, "--prompt-ids: found 'x', expected token ids separated by spaces"),
        (["--ids", "--prompt-ids", ""], 2, "the prompt is empty"),
        (["--ids", "Hello", "--prompt-ids", "1"], 2, "give one of them"),
        (["--ids", "Hello"], 2, "give --prompt-ids or --tokenizer"),
        (["--ids"], 2, "give --prompt-ids or --tokenizer"),
        (["--prompt-ids", "1"], 2, "no tokenizer is known for a vocabulary of 120"),
        (["--prompt-ids", "1", "--ids", "--stop", "x"], 2, "--stop needs the model's tokenizer"),
        (["--prompt-ids", "1", "--tokenizer", "gpt2", "--stop", ""], 2, "expected a text that is not empty"),
        (["--prompt-ids", "1", "--tokenizer", "gpt2", "--stop", "\udcff"], 2, "not valid text"),
        (["Hello", "--tokenizer", "gpt2"], 2, "is outside the model's vocabulary"),
        (["--ids", "--prompt-ids", "1", "--temperature", -1], 2, "--temperature -1"),
        (["--ids", "--prompt-ids", "1", "--num", 0], 2, "--num"),
        (["--tokenizer", "nowhere.json"], 3, "no such tokenizer"),
    ],
    ids=str,
)
def test_usage_and_data_errors(options, status, message):
    result = llmc("sample", TINY, *options)
    assert (result.exit_code, result.stdout_bytes) == (status, b"")
    assert message in " ".join(result.stderr.split())


def test_missing_and_invalid_model_files(tmp_path):
    result = llmc("sample", tmp_path / "none.bin", "--ids")
    assert result.exit_code == 3 and "No such file" in result.stderr
    path = tmp_path / "other.bin"
    path.write_bytes(bytes(2000))
    result = llmc("sample", path, "--ids")
    assert result.exit_code == 3 and str(path) in result.stderr
