import math

import pytest

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.training.options import CompatibilityOptions, TrainOptions


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", math.nan), ("lr", math.inf), ("lr", -1e-3), ("lr_final", math.nan), ("weight_decay", math.nan),
        ("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("eps", 0.0), ("eps", 1e-50), ("clip", math.nan),
        ("clip", 1e200), ("skip_loss_z", math.nan), ("skip_grad_z", -1.0),
    ],
)  # fmt: skip
def test_value_out_of_range_is_refused(name, value):
    with pytest.raises(UsageError, match=rf"--{name.replace('_', '-')} \S+: expected"):
        TrainOptions(**{name: value})


def test_unknown_schedule_is_refused():
    with pytest.raises(UsageError, match="--schedule exponential: expected one of cosine, linear, constant, wsd"):
        TrainOptions(schedule="exponential")


def test_course_excludes_outputs_and_evaluation():
    course = TrainOptions().course()
    assert {"model", "batch", "steps", "lr", "seed", "shuffle"} <= set(course)
    assert not {"out", "keep", "resume", "force", "val_every", "sample_every", "recompute"} & set(course)


@pytest.mark.parametrize("changes", [{"hellaswag": True}, {"zero": 2}, {"num_processes": 2}, {"process_rank": 1}])
def test_missing_feature_is_refused(changes):
    with pytest.raises(MissingError, match="not implemented yet"):
        CompatibilityOptions(**changes)
