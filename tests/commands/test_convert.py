"""``llmc convert``: output, exit status and error messages."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.paths import TINY_GPT2
from typer.testing import CliRunner

from llmc_cli.app import app
from llmc_cli.formats.shard import write_shard


@pytest.fixture
def llmc(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_shard("shard.bin", np.arange(65) % 97)
    return lambda *arguments: CliRunner().invoke(app, ["convert", *map(str, arguments)])


def test_stdout_has_a_line_per_file(llmc):
    result = llmc(TINY_GPT2 / "safetensors", "tiny.bin")
    assert result.exit_code == 0
    assert result.stdout == "writing 9,024 parameters (fp32, version 3) to tiny.bin\n"
    assert result.stderr.startswith("37.1 kB in ")
    assert Path("tiny.bin").read_bytes() == (TINY_GPT2 / "model.bin").read_bytes()
    assert llmc("tiny.bin", "old.bin", "--version", "1").stdout == (
        "writing 8,528 parameters (fp32, version 1) to old.bin\n"
    )
    folder = Path("folder")
    assert llmc("tiny.bin", folder, "--dtype", "bf16").stdout == (
        f"writing the model configuration to {folder / 'config.json'}\n"
        f"writing 8,528 parameters (bf16) to {folder / 'model.safetensors'}\n"
    )
    state = ("--debug-state", "state.bin", "--batch", 2, "--seq-len", 24, "--data", "shard.bin")
    assert llmc("tiny.bin", *state, "--reference", "numpy").stdout == (
        "writing the logits, loss and gradients of 48 tokens to state.bin\n"
    )


def test_json_output(llmc):
    result = llmc(TINY_GPT2 / "model.bin", "tiny.bin", "--dtype", "bf16", "--json", "--quiet")
    assert result.stderr == ""
    assert json.loads(result.stdout) == {
        "schema": 1,
        "source": str(TINY_GPT2 / "model.bin"),
        "model": {
            "max_seq_len": 24,
            "vocab_size": 97,
            "padded_vocab_size": 128,
            "num_layers": 2,
            "num_heads": 2,
            "channels": 16,
        },
        "reference": None,
        "files": [{"path": "tiny.bin", "content": "9,024 parameters (bf16, version 5)", "bytes": 19_072}],
    }


def test_json_output_names_the_reference(llmc):
    options = ("--debug-state", "state.bin", "--batch", 1, "--seq-len", 8, "--data", "shard.bin", "--json")
    result = llmc(TINY_GPT2 / "model.bin", *options, "--reference", "numpy")
    assert json.loads(result.stdout)["reference"] == "numpy"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([TINY_GPT2 / "model.bin"], 2, "give a DEST"),
        ([TINY_GPT2 / "model.bin", "tiny.bin", "--version", 3, "--dtype", "bf16"], 2, "--version 3 is fp32"),
        (
            [TINY_GPT2 / "model.bin", "tiny.bin", "--order", "norms-last"],
            2,
            "--order applies only to model files of version 2",
        ),
        (["missing.bin", "tiny.bin"], 3, "missing.bin: no such file or folder"),
        (["shard.bin", "tiny.bin"], 3, "found a GPT-2 token shard"),
        ([".", "tiny.bin"], 3, "config.json"),
        (["model.gguf", "tiny.bin"], 4, "found a GGUF file, which is not supported yet"),
    ],
)
def test_errors_are_one_line(llmc, arguments, status, message):
    Path("model.gguf").write_bytes(b"GGUF" + bytes(100))
    result = llmc(*arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr
    assert result.stderr.startswith("llmc: ")
    assert result.stderr.count("\n") == 1
    assert not Path("tiny.bin").exists()


def test_damaged_model_is_rejected(llmc):
    content = bytearray((TINY_GPT2 / "model.bin").read_bytes())
    content[1024 + 4 * 100 : 1024 + 4 * 101] = np.float32(np.nan).tobytes()
    Path("damaged.bin").write_bytes(content)
    result = llmc("damaged.bin", "tiny.bin")
    assert result.exit_code == 3
    assert "damaged.bin: found nan at wte[6, 4]" in result.stderr
    Path("damaged.bin").write_bytes(content[:-1])
    result = llmc("damaged.bin", "tiny.bin")
    assert result.exit_code == 3
    assert "37,119 bytes" in result.stderr
