import json

import pytest
from support.benchmark_inputs import SETTINGS, make_benchmark, make_row

from llmc_cli.benchmark.baseline import Baseline, read_baseline, this_machine
from llmc_cli.errors import DataError, UsageError


def test_save_and_read_round_trip(tmp_path):
    make_benchmark(make_row("train/step", 1.0, torch={"torch eager": 1.5, "torch compiled": 1.2})).save(
        tmp_path / "b.json"
    )
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["rows"][0]["ratios"] == {"torch eager": 1.5, "torch compiled": 1.2}
    assert document["rows"][0]["best_mode"] == "torch compiled"
    assert document["ceilings"]["flops_per_s"] == 100e9
    baseline = read_baseline(tmp_path / "b.json")
    assert baseline.seconds == {"train/step": 1.0}
    baseline.check(this_machine(), SETTINGS)


def test_changes_cover_common_rows_without_operations():
    before = Baseline("b", {}, {}, {"train/step": 1.0, "train/step/adamw": 0.1, "sample/token": 0.02, "gone": 1.0})
    changes = before.changes(
        [
            make_row("train/step", 1.2),
            make_row("train/step/adamw", 0.5, calls=1),
            make_row("sample/token", 0.01),
            make_row("new", 1.0),
        ]
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
        ({}, {"sections": {"sample": {"batch": 1, "seq_len": 64}}}, "none of the requested sections"),
    ],
)
def test_baseline_with_other_settings_is_rejected(machine, settings, message):
    baseline = Baseline("b", this_machine() | machine, SETTINGS | settings, {})
    with pytest.raises(UsageError, match=message):
        baseline.check(this_machine(), SETTINGS)


def test_models_are_compared_by_configuration():
    Baseline("b", this_machine(), SETTINGS | {"model": "gpt2:d12"}, {}).check(this_machine(), SETTINGS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "rows": 3}', '{"schema": 2}'])
def test_other_files_are_rejected(tmp_path, text):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(DataError, match=r"b\.json: (not a saved benchmark|found schema 2)"):
        read_baseline(tmp_path / "b.json")
