import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from llmc_cli.app import app
from llmc_cli.commands import decode as command
from llmc_cli.formats.shard import write_shard
from llmc_cli.formats.vocabulary import write_vocabulary
from llmc_cli.tokenizer.tokenizer import load_tokenizer, write_tokenizer_table


def decode(*arguments, **more):
    return CliRunner().invoke(app, ["decode", *map(str, arguments)], **more)


@pytest.fixture
def shards(tmp_path):
    """Two shards with the ids 0 to 99 and 100 to 149."""
    write_shard(tmp_path / "a.bin", np.arange(100))
    write_shard(tmp_path / "b.bin", np.arange(100, 150))
    return tmp_path / "a.bin", tmp_path / "b.bin"


def text_of(ids):
    return load_tokenizer("gpt2").decode_bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("arguments", [["15496", "995", "0"], ["15496 995 0"], ["15496 995", "\n0\t"]])
def test_ids_as_arguments(arguments):
    result = decode(*arguments)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello world!\n", "")


@pytest.mark.parametrize("arguments", [[], ["-"]])
@pytest.mark.parametrize(
    "content", ["15496 995 0", "15496\t995  0 \n", "\n\n15496\n995\n0\n", "15496\r\n995\r\n0", " 15496 995 0\n\n\n"]
)
def test_ids_on_stdin(arguments, content):
    assert decode(*arguments, input=content).stdout == "Hello world!\n"


def test_line_of_several_ids_is_a_separate_text():
    """As written by `llmc sample --num 2 --ids`. Consecutive lines of one id form one text."""
    assert decode(input="50256 15496 995\n50256 15496 0\n").stdout == "Hello world\nHello!\n"
    assert decode(input="15496 995\n0").stdout == "Hello world\n!\n"
    assert decode(input="15496\n995\n0 0\n").stdout == "Hello world!!\n"


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_stdin_read_in_small_blocks(monkeypatch, block):
    monkeypatch.setattr(command, "BLOCK", block)
    assert decode(input="15496 995\n\n50256 15496 0 \n15496\n995").stdout == "Hello world\nHello!\nHello world\n"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_input_gives_empty_output(content):
    result = decode(input=content)
    assert (result.exit_code, result.stdout) == (0, "")


def test_incomplete_character_at_the_end_of_a_text():
    ids = load_tokenizer("gpt2").encode("🙂").tolist()
    assert decode(*ids).stdout == "🙂\n"
    assert decode(input=f"0 {ids[0]}\n{ids[1]} 0\n").stdout == f"!\ufffd\n{text_of(ids[1:])}!\n"


def test_special_tokens_are_skipped_or_shown():
    ids = ["50256", "15496", "50256"]
    assert decode(*ids).stdout == decode(*ids, "--special", "skip").stdout == "Hello\n"
    assert decode(*ids, "--special", "show").stdout == "<|endoftext|>Hello<|endoftext|>\n"
    assert decode("50256").stdout == "\n"


def test_shards_are_concatenated(shards):
    first, second = shards
    assert decode(first).stdout == text_of(range(100)) + "\n"
    assert decode(first, second).stdout == text_of(range(150)) + "\n"


@pytest.mark.parametrize(
    ("offset", "limit"), [(0, 10), (90, 20), (100, 10), (120, 1000), (150, 5), (0, 0), (5, None), (0, 150)]
)
def test_offset_and_limit(shards, offset, limit, monkeypatch):
    monkeypatch.setattr(command, "BLOCK", 7)
    options = ["--offset", offset] + ([] if limit is None else ["--limit", limit])
    expected = text_of(list(range(150))[offset:][:limit])
    assert decode(*shards, *options).stdout == (expected + "\n" if expected else "")


def test_offset_beyond_the_end_is_rejected(shards):
    result = decode(*shards, "--offset", 151)
    assert (result.exit_code, result.stderr) == (
        2,
        "llmc: --offset 151 is beyond the end of the shards: found 150 tokens\n",
    )


def test_other_tokenizers(tmp_path):
    write_vocabulary(tmp_path / "t.bin", [b"a", b"b", b"<end>"], 2)
    assert decode("0", "1", "2", "--tokenizer", tmp_path / "t.bin").stdout == "ab\n"
    write_tokenizer_table(tmp_path / "gpt2.bin", load_tokenizer("gpt2"))
    assert decode("15496", "995", "--tokenizer", tmp_path / "gpt2.bin").stdout == "Hello world\n"


def test_json_output(shards):
    assert json.loads(decode("15496", "995", "--json").stdout) == {"schema": 1, "tokens": 2, "text": "Hello world"}
    result = decode("--json", input="15496 995\n15496 0\n")
    assert json.loads(result.stdout) == {"schema": 1, "tokens": 4, "text": "Hello world\nHello!"}
    result = decode(shards[0], "--offset", 30, "--limit", 5, "--json")
    assert json.loads(result.stdout) == {"schema": 1, "tokens": 5, "text": text_of(range(30, 35))}
    assert json.loads(decode("--json", input="").stdout) == {"schema": 1, "tokens": 0, "text": ""}


@pytest.mark.parametrize(
    ("arguments", "content", "status", "message"),
    [
        (
            ["15496", "50257"],
            "",
            3,
            "token id 50257 at position 1 is outside the vocabulary of gpt2: expected 0 to",
        ),
        ([], "1 2\n3 70000\n", 3, "token id 70000 at position 3 "),
        ([], "1 2 -3", 3, "found '-3' at position 2, expected a token id"),
        ([], "1 2\n3 x4", 3, "found 'x4' at position 3, expected a token id"),
        ([], "1,2", 3, "found '1,2' at position 0, expected a token id"),
        ([], "1_0", 3, "found '1_0' at position 0"),
        ([], "٣", 3, "at position 0, expected a token id"),
        ([], "9" * 5000, 3, "found '99999999999999999999…' at position 0"),
        (["hello"], "", 3, "found 'hello' at position 0, expected a token id"),
        (["none.bin"], "", 3, "none.bin: No such file or directory"),
        (["1", "none.bin"], "", 2, "found ids and shards together"),
        (["1", "-"], "", 2, "found ids and stdin together"),
        (["1", "--offset", "1"], "", 2, "--offset and --limit are only for shards"),
        (["--limit", "1"], "1 2", 2, "--offset and --limit are only for shards"),
        (["1", "--tokenizer", "none"], "", 3, "none: no such tokenizer"),
    ],
)
def test_invalid_input_is_rejected(arguments, content, status, message):
    result = decode(*arguments, input=content)
    assert result.exit_code == status
    assert result.stderr.startswith("llmc: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_position_of_an_invalid_id_in_a_shard(tmp_path):
    write_shard(tmp_path / "a.bin", [1, 2, 60000, 3])
    assert "token id 60000 at position 2 " in decode(tmp_path / "a.bin").stderr
    assert "token id 60000 at position 2 " in decode(tmp_path / "a.bin", "--offset", 1).stderr
    assert decode(tmp_path / "a.bin", "--limit", 2).exit_code == 0


def test_file_that_is_not_a_shard_is_rejected(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(2000))
    result = decode(tmp_path / "a.bin")
    assert result.exit_code == 3
    assert "a.bin: found an unknown file format (magic number 0), expected " in result.stderr


def test_options_out_of_range_are_rejected():
    for option in (["--special", "x"], ["--limit", "-1"]):
        assert decode("1", *option).exit_code == 2


LLMC = [sys.executable, "-m", "llmc_cli.app"]


def test_stdin_is_decoded_as_it_arrives():
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    with subprocess.Popen([*LLMC, "decode"], bufsize=0, **pipes) as process:
        process.stdin.write(b"15496 9")
        assert process.stdout.read(5) == b"Hello"
        process.stdin.write(b"95 ")
        assert process.stdout.read(6) == b" world"
        process.stdin.write(b"0")
        process.stdin.close()
        assert process.stdout.read() == b"!\n"
    assert process.returncode == 0


def test_output_is_utf8_in_any_locale():
    ids = load_tokenizer("gpt2").encode("é的").tolist()
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    output = subprocess.run([*LLMC, "decode", *map(str, ids)], check=True, capture_output=True, env=environment).stdout
    assert output == "é的\n".encode()


def test_closed_stdout_ends_quietly(tmp_path):
    write_shard(tmp_path / "a.bin", np.zeros(1_000_000, np.int32))
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*LLMC, "decode", str(tmp_path / "a.bin")], **pipes) as process:
        assert process.stdout.read(10) == b"!" * 10
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
