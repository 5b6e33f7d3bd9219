import math

import pytest

from llmc_cli.training.schedules import Schedule


def test_warmup_is_linear_and_ends_at_lr():
    schedule = Schedule("linear", 1.0, 4, 10, 0.0)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_constant_has_no_warmup():
    assert Schedule("constant", 0.5, 4, 10, 0.0)(0) == 0.5


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 2, 1.0),
        ("cosine", 6, 0.1 + 0.5 * 0.9),
        ("cosine", 10, 0.1),
        ("linear", 2, 1.0),
        ("linear", 6, 1 - 0.5 * 0.9),
        ("linear", 10, 0.1),
        ("wsd", 2, 1.0),
        ("wsd", 7, 1.0),
        ("wsd", 8, 1.0),
        ("wsd", 9, 0.1 + (1 - math.sqrt(0.5)) * 0.9),
        ("wsd", 10, 0.1),
    ],
)
def test_decay_after_warmup(kind, step, expected):
    assert Schedule(kind, 1.0, 2, 10, 0.1)(step) == pytest.approx(expected)


def test_unknown_schedule_raises():
    with pytest.raises(ValueError, match="cosine, linear, constant, wsd"):
        Schedule("exponential", 1.0, 0, 1, 0.0)(0)
