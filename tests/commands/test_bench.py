"""Output and exit status of ``bench``, with made-up ceilings and tiny runs."""

import json

import pytest
from typer.testing import CliRunner

from llmc_cli.app import app
from llmc_cli.benchmark import benchmark, startup
from llmc_cli.benchmark.ceilings import Ceilings


@pytest.fixture
def bench(monkeypatch, tiny_config):
    ceilings = Ceilings("fp32", {"1536 x 1536 x 1536": 300e9}, {"read": 30e9, "copy": 40e9})
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda backend: ceilings)

    def run(*arguments, input=None):
        given = ["bench", *map(str, arguments), "--model", tiny_config, "-t", 8, "--steps", 2, "--threads", 1]
        return CliRunner().invoke(app, list(map(str, given)), input=input)

    return run


@pytest.mark.usefixtures("backend")  # the kernels are compiled already
def test_tables_on_stdout_progress_on_stderr(bench):
    result = bench("train", "-b", 2, "--precision", "fp32")
    assert result.exit_code == 0, result.output
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert lines[:4] == [
        ["ceiling", "fp32"],
        ["matmul 1536 x 1536 x 1536", "300.0 GFLOP/s"],
        ["memory read", "30.0 GB/s"],
        ["memory copy", "40.0 GB/s"],
    ]
    assert lines[4] == ["row", "ms", "best", "runs", "rate", "share", "of"]
    step = lines[5]
    assert (step[0], step[3], step[6]) == ("train/step", "2", "MFU")
    assert step[4].endswith(" tok/s")
    assert any(line[0].startswith("train/step/linear_backward") for line in lines)
    assert lines[-1][0] == "train: llmc"
    assert "measuring ceilings" in result.stderr
    assert "train: step" in result.stderr


def test_recompute_level_is_recorded(bench):
    result = bench("train", "--recompute", 2, "--json", "--quiet")
    document = json.loads(result.stdout)
    assert document["settings"]["sections"] == {"train": {"batch": 4, "seq_len": 8, "recompute": 2}}
    (side,) = document["sides"]
    assert side["configuration"]["recompute"] == 2
    assert side["peak_memory"] is None or side["peak_memory"] > 0


def test_json_output_is_one_document(bench):
    result = bench("sample", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert document["settings"]["sections"] == {"sample": {"batch": 1, "seq_len": 8}}
    rows = document["rows"]
    assert [row["name"] for row in rows] == [f"sample/token {precision}" for precision in ("fp32", "bf16", "int8")]
    assert rows[0]["ceiling"] == "read"
    row = rows[-1]
    assert row["tokens_per_s"] == pytest.approx(1 / row["seconds"])
    assert document["sides"][0]["side"] == "llmc"
    assert document["ceilings"]["bytes_per_s"] == 40e9
    assert {"machine", "load", "versions", "changes", "compile_seconds"} < document.keys()


def scale_saved_times(path, scale):
    """Multiply the times in the saved results at ``path``."""
    content = json.loads(path.read_text())
    for row in content["rows"]:
        row["seconds"] *= scale
    path.write_text(json.dumps(content))


def test_save_and_compare_with_baseline(bench, tmp_path):
    path = tmp_path / "before.json"
    assert bench("sample", "--save", path).exit_code == 0
    scale_saved_times(path, 1e6)
    faster = bench("sample", "--baseline", path)
    assert faster.exit_code == 0, faster.output
    assert "sample/token fp32\t" in faster.stdout.split("row\tbefore, ms\tnow, ms\tchange\n")[1]
    scale_saved_times(path, 1e-12)
    slower = bench("sample", "--baseline", path, "--tolerance", 0.25, "--save", path)
    assert slower.exit_code == 1
    assert "more than 25%: sample/token fp32 (+" in slower.stderr
    assert json.loads(path.read_text())["changes"][0]["slowdown"] > 1  # the results are saved despite exit status 1
    other = bench("sample", "--baseline", path, "-b", 3)
    assert other.exit_code == 2
    assert "sample: batch was 1, is 3" in other.stderr


def test_dash_is_stdout_and_stdin(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = bench("sample", "--save", "-", "--quiet")
    assert saved.exit_code == 0, saved.output
    assert json.loads(saved.stdout)["rows"]
    again = bench("sample", "--baseline", "-", "--tolerance", 1e9, "--quiet", input=saved.stdout)
    assert again.exit_code == 0, again.output
    assert "row\tbefore, ms\tnow, ms\tchange" in again.stdout
    document = json.loads(saved.stdout)
    document["rows"][0]["seconds"] = 1e-12
    slower = bench("sample", "--baseline", "-", input=json.dumps(document))
    assert slower.exit_code == 1
    assert "slower than stdin by more than 10%" in slower.stderr
    elsewhere = bench("sample", "--baseline", "-", "-b", 3, input=saved.stdout)
    assert elsewhere.exit_code == 2
    assert "stdin: not comparable: sample: batch was 1, is 3" in elsewhere.stderr
    other = bench("sample", "--baseline", "-", input="x")
    assert other.exit_code == 3
    assert other.stderr.startswith("llmc: stdin: not a saved benchmark")
    assert list(tmp_path.glob("-")) == []


def test_plot_writes_a_chart(bench, tmp_path):
    result = bench("sample", "--plot", tmp_path / "chart.svg")
    assert result.exit_code == 0, result.output
    assert b"sample/token" in (tmp_path / "chart.svg").read_bytes()


@pytest.mark.usefixtures("backend")
def test_start_section_has_rows_but_no_workers(bench, monkeypatch):
    monkeypatch.setattr(startup, "time_first_step", lambda *arguments: 1.5)
    result = bench("start")
    assert result.exit_code == 0, result.output
    names = [line.split("\t")[0] for line in result.stdout.splitlines()]
    assert names[-4:] == ["row", "start/warm", "start/cold", "start/cold/compile"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("losses",), 2, "losses"),
        (("train", "--plot", "chart.gif"), 2, "expected .svg or .png"),
        (("start", "--plot", "chart.svg"), 2, "no ceiling to plot against"),
        (("prepro", "--against", "torch"), 2, "no PyTorch equivalent of prepro"),
        (("train", "--against", "jax"), 2, "jax"),
        (("train", "--baseline", "missing.json"), 3, "missing.json: No such file"),
        (("train", "--device", "cuda"), 4, "CuPy"),
    ],
)
def test_invalid_options(no_cupy, bench, arguments, status, message):
    result = bench(*arguments)
    assert result.exit_code == status
    assert message in result.stderr
    assert result.stdout == ""


def test_missing_torch(bench, monkeypatch):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    result = bench("train", "--against", "torch")
    assert result.exit_code == 4
    assert result.stderr == "llmc: --against torch: PyTorch is not installed; run pip install 'llmc-cli[witness]'\n"


@pytest.mark.witness
def test_against_torch(bench):
    result = bench("train", "-b", 2, "--against", "torch")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[4].startswith("row\tms\tbest\truns\trate\tshare\tof\ttorch eager ms\tratio")
    assert any(line.startswith("train: torch eager\t") and "torch 2" in line for line in lines)
    assert lines[-1].startswith("train/step: ratio ")
    assert "medians of 2 interleaved runs" in lines[-1]
