"""``llmc verify``: output and exit status."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.faulty_checks import STATE_OFFSETS, Float32Kernels, damaged_state, faulty_kernels, perturb_last
from support.paths import TINY_GPT2
from typer.testing import CliRunner

from llmc_cli.app import app
from llmc_cli.formats.shard import write_shard
from llmc_cli.kernels import backend as device
from llmc_cli.kernels.backend import Backend
from llmc_cli.kernels.operations import OPERATIONS

MODEL, STATE, LOSSES = (str(TINY_GPT2 / name) for name in ("model.bin", "debug_state.bin", "losses.txt"))
BITS = [
    pytest.param(place.values[0], place.values[1], id=place.values[0])
    for place in STATE_OFFSETS
    if "largest" in place.id
]


def llmc(*arguments, stdin=None):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], input=stdin)


@pytest.fixture
def kernels(monkeypatch):
    """A function that sets the kernels used by the command."""

    def use(kernels):
        backend = Backend(kernels, "cpu", "fp32", 1, "a test's", "")
        monkeypatch.setattr(device, "open_kernels", lambda *options: backend)

    return use


def failed(output):
    """Return the names in the rows of the table that are not ok."""
    rows = [line.split("\t") for line in output.splitlines()]
    return {row[0] for row in rows if len(row) == 7 and row[-1] == "0"}


def test_kernels_pass():
    result = llmc("--threads", 1)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == "overall okay: 1"
    table = dict(line.split("\t") for line in lines if line.count("\t") == 1)
    assert table["device"] == "cpu"
    assert table["threads"] == "1"
    assert {"runs on", "python", "numpy", "numba", "llmc-cli"} <= set(table)
    assert set(OPERATIONS) <= {line.split("\t")[0] for line in lines}
    assert failed(result.stdout) == set()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_faulty_kernel_fails(kernels, operation):
    kernels(faulty_kernels(operation, list(OPERATIONS[operation].bounds)[-1], perturb_last))
    result = llmc()
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "overall okay: 0"
    assert operation in failed(result.stdout)
    assert operation in result.stderr


def test_json_output_of_kernels(kernels):
    kernels(faulty_kernels("linear_backward", "db", lambda db: db.fill(np.nan)))
    result = llmc("--json", "--quiet")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert (document["schema"], document["okay"]) == (1, False)
    bad = next(check for check in document["checks"] if not check["ok"])
    assert (bad["name"], bad["max_error"]) == ("linear_backward", None)
    assert document["environment"]["runs on"] == "a test's"


def test_state_passes():
    result = llmc(MODEL, "--state", STATE, "--losses", LOSSES)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "overall okay: 1"
    names = [line.split("\t")[0] for line in result.stdout.splitlines() if line.count("\t") == 6]
    assert names[1:3] == ["logits", "loss"]
    assert names[-10:] == [f"loss {step}" for step in range(1, 11)]
    assert len(names) == 1 + 19 + 10


def test_json_output_of_state():
    document = json.loads(llmc(MODEL, "--state", STATE, "--losses", LOSSES, "--json").stdout)
    assert document["okay"]
    assert (document["environment"]["model"], document["environment"]["state"]) == (MODEL, STATE)
    assert all(check["ok"] for check in document["checks"])


@pytest.mark.parametrize(("name", "at"), BITS)
def test_flipped_bit_fails(kernels, tmp_path, name, at):
    kernels(Float32Kernels())
    result = llmc(MODEL, "--state", damaged_state(tmp_path, at), "--losses", LOSSES)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "overall okay: 0"
    assert failed(result.stdout) == {name}


def test_losses_from_stdin(kernels):
    kernels(Float32Kernels())
    assert llmc(MODEL, "--state", STATE, "--losses", "-", stdin=Path(LOSSES).read_text()).exit_code == 0
    text = Path(LOSSES).read_text()
    result = llmc(MODEL, "--state", STATE, "--losses", "-", stdin=text.replace("4.81", "4.82"))
    assert result.exit_code == 1
    assert failed(result.stdout) == {"loss 4"}


@pytest.mark.parametrize("content", [b"4.8\nfour\n", b"", b"\xff\xfe\n" * 10])
def test_invalid_losses_are_rejected(tmp_path, content):
    (tmp_path / "losses.txt").write_bytes(content)
    result = llmc(MODEL, "--state", STATE, "--losses", tmp_path / "losses.txt")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "losses.txt" in result.stderr


def test_number_of_steps(kernels):
    kernels(Float32Kernels())
    assert "loss 3\t" in llmc(MODEL, "--state", STATE, "--steps", 3).stdout
    assert "loss 1\t" not in llmc(MODEL, "--state", STATE, "--steps", 0).stdout


@pytest.mark.parametrize(
    "arguments", [["--losses", LOSSES], ["--state", STATE], [MODEL, MODEL, "--state", STATE], ["--steps", "-1"]]
)
def test_wrong_usage(arguments):
    result = llmc(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_files(tmp_path):
    write_shard(tmp_path / "shard.bin", [1, 2, 3])
    result = llmc(MODEL, tmp_path / "shard.bin")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "file\tkind\tversion\tcontent\tok",
        f"{MODEL}\tGPT-2 model\t3\tT 24, V 97, Vp 128, L 2, NH 2, C 16, parameters 9,024, dtype float32\t1",
        f"{tmp_path / 'shard.bin'}\tGPT-2 token shard\t1\ttokens 3, min id 1, max id 3\t1",
    ]


def test_all_invalid_files_are_reported(tmp_path):
    write_shard(tmp_path / "shard.bin", [1, 50257])
    shutil.copy(LOSSES, tmp_path)
    result = llmc(tmp_path / "shard.bin", MODEL, tmp_path / "losses.txt", TINY_GPT2 / "model_bf16.bin")
    assert result.exit_code == 3
    assert [line.split("\t")[-1] for line in result.stdout.splitlines()[1:]] == ["0", "1", "0", "1"]
    first, second = result.stderr.splitlines()
    assert first.startswith(f"llmc: {tmp_path / 'shard.bin'}: found token id 50257")
    assert second.startswith(f"llmc: {tmp_path / 'losses.txt'}: found an unknown file format (magic number ")


def test_json_output_of_files(tmp_path):
    result = llmc(MODEL, tmp_path / "none.bin", "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert (document["schema"], document["okay"]) == (1, False)
    model, none = document["files"]
    assert model["facts"]["V"] == 97
    assert (model["error"], none["error"]) == (None, f"{tmp_path / 'none.bin'}: No such file or directory")
