import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llmc_cli.app import app
from llmc_cli.data import tinyshakespeare
from llmc_cli.errors import MissingError
from llmc_cli.formats.shard import read_shard
from llmc_cli.tokenizer.tokenizer import load_tokenizer, write_tokenizer_table


@pytest.fixture(autouse=True)
def work_dir(tmp_path, monkeypatch):
    """An empty working directory; downloads fail."""

    def download(*arguments):
        raise MissingError("no network here")

    monkeypatch.setattr(tinyshakespeare, "download", download)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def prepro(*arguments, **more):
    return CliRunner().invoke(app, ["prepro", *map(str, arguments)], **more)


@pytest.fixture
def stories(work_dir):
    (work_dir / "a.txt").write_text("Once upon a time.\n<|endoftext|>\nThe end.\n")
    (work_dir / "b.jsonl").write_text('{"text": "Hello"}\n{"text": "world"}\n')
    return ["text", "a.txt", "b.jsonl", "--val-tokens", 5]


def decode(*paths):
    ids = [int(token) for path in paths for token in read_shard(path).tokens]
    return load_tokenizer("gpt2").decode_bytes(ids).decode()


STORIES = "<|endoftext|>Once upon a time.\n<|endoftext|>The end.\n<|endoftext|>Hello<|endoftext|>world"


def test_tinyshakespeare_from_a_file(work_dir):
    (work_dir / "plays.txt").write_text("A:\nto be\n\nB:\nor not\n\nA:\nto be\n" + "!" * 4)
    result = prepro("tinyshakespeare", "--source", "plays.txt", "--val-tokens", 12)
    files = [Path("data") / "tinyshakespeare" / f"tiny_shakespeare_{split}.bin" for split in ("val", "train")]
    assert result.exit_code == 0
    assert result.stdout == f"writing 12 tokens to {files[0]}\nwriting 10 tokens to {files[1]}\n"
    assert result.stderr.startswith("22 tokens in ")
    assert decode(*files) == ("<|endoftext|>A:\nto be\n\n<|endoftext|>B:\nor not\n\n<|endoftext|>A:\nto be\n!!!!")


def test_bundled_text():
    result = prepro("tinyshakespeare", "--source", "bundled", "--out", "x")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"writing 32,768 tokens to {Path('x') / 'tiny_shakespeare_val.bin'}",
        f"writing 278,335 tokens to {Path('x') / 'tiny_shakespeare_train.bin'}",
    ]
    assert "warning" not in result.stderr


def test_auto_without_network_warns_and_uses_the_bundled_text(work_dir):
    result = prepro("tinyshakespeare")
    assert result.exit_code == 0
    assert "llmc: warning: no network here; using the bundled plays instead" in result.stderr
    assert "writing 278,335 tokens" in result.stdout
    result = prepro("tinyshakespeare", "--source", "download", "--out", "other")
    assert (result.exit_code, result.stdout, result.stderr) == (4, "", "llmc: no network here\n")
    assert not (work_dir / "other").exists()


@pytest.mark.skipif("LLMC_TINYSHAKESPEARE" not in os.environ, reason="needs the original text, as LLMC_TINYSHAKESPEARE")
def test_original_text(work_dir):
    result = prepro("tinyshakespeare", "--source", os.environ["LLMC_TINYSHAKESPEARE"])
    folder = work_dir / "data" / "tinyshakespeare"
    assert [line.split(" tokens")[0] for line in result.stdout.splitlines()] == ["writing 32,768", "writing 305,260"]
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes == {"tiny_shakespeare_train.bin": 611_544, "tiny_shakespeare_val.bin": 66_560}


def test_text_files(stories, work_dir):
    result = prepro(*stories)
    assert result.exit_code == 0
    assert decode(work_dir / "data/text/text_val.bin", work_dir / "data/text/text_train.bin") == STORIES
    assert "writing 5 tokens to " in result.stdout


def test_text_in_shards(stories, work_dir):
    result = prepro(*stories, "--shard-tokens", 8)
    assert result.exit_code == 0
    names = sorted(path.name for path in (work_dir / "data/text").iterdir())
    assert names == ["text_train_000001.bin", "text_train_000002.bin", "text_val_000000.bin"]
    assert decode(*(work_dir / "data/text" / name for name in (names[-1], *names[:-1]))) == STORIES
    assert len(result.stdout.splitlines()) == 3
    result = prepro(*stories)
    assert result.stderr.count("removed ") == 3


def test_text_from_stdin(work_dir):
    result = prepro("text", "-", "--val-tokens", 0, input=b"Hello world")
    assert result.exit_code == 0
    assert decode(work_dir / "data/text/text_train.bin") == "<|endoftext|>Hello world"


def test_headerless(work_dir):
    result = prepro("text", "-", "--val-tokens", 0, "--format", "headerless", input="Hello world")
    assert result.exit_code == 0
    content = (work_dir / "data/text/text_train.bin").read_bytes()
    assert content == b"".join(id.to_bytes(4, "little") for id in (50256, 15496, 995))


def test_json_output(stories):
    result = prepro(*stories, "--json")
    document = json.loads(result.stdout)
    assert document.pop("seconds") >= 0
    assert document == {
        "schema": 1,
        "dataset": "text",
        "source": "a.txt b.jsonl",
        "tokenizer": "gpt2",
        "tokens": 16,
        "files": [
            {"path": str(Path("data/text/text_val.bin")), "split": "val", "tokens": 5, "bytes": 1034},
            {"path": str(Path("data/text/text_train.bin")), "split": "train", "tokens": 11, "bytes": 1046},
        ],
        "removed": [],
    }


def test_quiet_prints_nothing_on_stderr():
    result = prepro("tinyshakespeare", "--quiet")
    assert result.exit_code == 0 and result.stderr == ""


def test_dry_run_prints_the_plan_only(stories, work_dir):
    before = sorted(work_dir.iterdir())
    for arguments in (["tinyshakespeare"], stories):
        result = prepro(*arguments, "--dry-run")
        assert result.exit_code == 0 and result.stderr == ""
        rows = dict(line.split("\t") for line in result.stdout.splitlines())
        assert rows["dataset"] == arguments[0]
        assert rows["format"] == "GPT-2 token shard"
    assert (rows["val_tokens"], rows["source"]) == ("5", "a.txt b.jsonl")
    assert "32768; for text, at most 1/10 of the tokens" in prepro("text", "a.txt", "--dry-run").stdout
    document = json.loads(prepro("tinyshakespeare", "--dry-run", "--json", "--val-tokens", 0).stdout)
    assert document["dry_run"] is True
    assert document["files"] == [str(Path("data/tinyshakespeare/tiny_shakespeare_train.bin"))]
    assert sorted(work_dir.iterdir()) == before


@pytest.mark.parametrize("dataset", ["tinystories", "fineweb", "fineweb-edu", "hellaswag", "mmlu"])
def test_unimplemented_data_sets_are_rejected(dataset):
    result = prepro(dataset)
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr == f"llmc: data set {dataset}: not implemented yet; expected tinyshakespeare or text\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (
            ["shakespeare"],
            2,
            "unknown data set 'shakespeare': expected tinyshakespeare or text",
        ),
        (["text"], 2, "`llmc prepro text` needs at least one FILE: .txt, .jsonl, or - for text from stdin"),
        (["text", "a.txt", "--source", "bundled"], 2, "--source is only for tinyshakespeare"),
        (["text", "a.md"], 2, "a.md: found .md, expected .txt or .jsonl"),
        (["text", "a.parquet"], 4, "a.parquet: .parquet files are not implemented yet"),
        (["text", "none.txt"], 3, "none.txt: No such file or directory"),
        (["text", "none.txt", "--dry-run"], 3, "none.txt: No such file or directory"),
        (["tinyshakespeare", "a.txt"], 2, "tinyshakespeare takes no files (found a.txt)"),
        (["tinyshakespeare", "--source", "none"], 3, "none: No such file or directory"),
        (["tinyshakespeare", "--val-tokens", "9999999"], 3, "leave none for training"),
        (["tinyshakespeare", "--tokenizer", "none"], 3, "none: no such tokenizer"),
        (["tinyshakespeare", "--tokenizer", "llama3"], 4, "tokenizer llama3: not implemented yet"),
        (["text", "-", "--shard-tokens", "3000000000"], 2, "expected 1 to 2,147,483,647"),
        (["text", "-", "--shard-tokens", "5", "--val-tokens", "6"], 2, "--val-tokens: found 6, expected 0 to 5"),
        (["text", "empty.txt"], 3, "there is no text to encode"),
        (["text", "latin.txt"], 3, "latin.txt: not UTF-8 at byte 1"),
        (["text", "bad.jsonl"], 3, "bad.jsonl, line 1: invalid JSON"),
    ],
)
def test_invalid_input_is_rejected(work_dir, arguments, status, message):
    (work_dir / "a.txt").write_text("a")
    (work_dir / "empty.txt").write_text(" \n")
    (work_dir / "latin.txt").write_bytes(b"a\xe9b")
    (work_dir / "bad.jsonl").write_text("{\n")
    before = sorted(work_dir.iterdir())
    result = prepro(*arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    *warnings, error = result.stderr.splitlines()
    assert error.startswith("llmc: ") and message in error
    assert all("warning" in line for line in warnings)
    assert sorted(work_dir.iterdir()) == before


@pytest.mark.parametrize(
    "option", [["--workers", "0"], ["--shard-tokens", "0"], ["--format", "x"], ["--val-tokens", "-1"]]
)
def test_options_out_of_range_are_rejected(option):
    assert prepro("tinyshakespeare", *option).exit_code == 2


def test_tokenizer_table_is_rejected(work_dir):
    write_tokenizer_table(work_dir / "t.bin", load_tokenizer("gpt2"))
    result = prepro("tinyshakespeare", "--source", "bundled", "--tokenizer", "t.bin")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "t.bin: a tokenizer table can only decode" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to groups of processes")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_stops_workers_and_removes_files(work_dir, number, status):
    """The signal is sent to the workers too. No traceback is printed, and no process or file remains."""
    command = [sys.executable, "-m", "llmc_cli.app", "prepro", "text", "-", "--workers", "2", "--out", "out"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, bufsize=0, start_new_session=True, cwd=work_dir, **pipes) as process:

        def write_endlessly():
            try:
                while True:
                    process.stdin.write(b"all work and no play makes Jack a dull boy\n" * 1000)
            except OSError:
                pass

        thread = threading.Thread(target=write_endlessly)
        thread.start()
        deadline = time.monotonic() + 30
        while not list(work_dir.glob("out/.text.*.part/*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        assert process.wait(30) == status
        thread.join()
        assert process.stdout.read() == process.stderr.read() == b""  # read() returns, so all workers have exited
    assert not list((work_dir / "out").iterdir())
