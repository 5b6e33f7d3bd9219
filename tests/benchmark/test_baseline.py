"""Saved results, and what they are compared with."""

import json

import pytest
from support.benchmark_inputs import SETTINGS, benchmark, row

from llmc_cli.benchmark.baseline import Baseline, read_baseline, this_machine
from llmc_cli.errors import DataError, UsageError


def test_saved_results_are_read_again(tmp_path):
    benchmark(row("train/step", 1.0, torch={"torch eager": 1.5, "torch compiled": 1.2})).save(tmp_path / "b.json")
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["rows"][0]["ratios"] == {"torch eager": 1.5, "torch compiled": 1.2}
    assert document["rows"][0]["best_mode"] == "torch compiled"
    assert document["ceilings"]["flops_per_s"] == 100e9
    baseline = read_baseline(tmp_path / "b.json")
    assert baseline.seconds == {"train/step": 1.0}
    baseline.check(this_machine(), SETTINGS)


def test_changes_are_of_rows_in_both_and_not_of_parts():
    before = Baseline("b", {}, {}, {"train/step": 1.0, "train/step/adamw": 0.1, "sample/token": 0.02, "gone": 1.0})
    changes = before.changes(
        [row("train/step", 1.2), row("train/step/adamw", 0.5, calls=1), row("sample/token", 0.01), row("new", 1.0)]
    )
    assert [change.name for change in changes] == ["train/step", "sample/token"]
    assert [change.slowdown for change in changes] == pytest.approx([0.2, -0.5])


@pytest.mark.parametrize(
    ("machine", "settings", "message"),
    [
        ({"cores": 64}, {}, "cores was 64, is"),
        ({}, {"threads": 1}, "threads was 1, is 2"),
        ({}, {"model": "d6", "config": {"channels": 384}}, "model was d6, is d12"),
        ({}, {"sections": {"train": {"batch": 8, "seq_len": 64}}}, "train: batch was 8, is 4"),
        ({}, {"sections": {"sample": {"batch": 1, "seq_len": 64}}}, "none of these sections"),
    ],
)
def test_a_baseline_of_something_else_is_refused(machine, settings, message):
    baseline = Baseline("b", this_machine() | machine, SETTINGS | settings, {})
    with pytest.raises(UsageError, match=message):
        baseline.check(this_machine(), SETTINGS)


def test_another_name_for_the_same_model_is_no_difference():
    Baseline("b", this_machine(), SETTINGS | {"model": "gpt2:d12"}, {}).check(this_machine(), SETTINGS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "rows": 3}', '{"schema": 2}'])
def test_other_files_are_no_baseline(tmp_path, text):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(DataError, match=r"b\.json: found"):
        read_baseline(tmp_path / "b.json")
