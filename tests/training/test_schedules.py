import math

import numpy as np
import pytest

from llmc_cli.errors import UsageError
from llmc_cli.training.outliers import WINDOW, OutlierDetector
from llmc_cli.training.schedules import Schedule


def test_warmup_counts_from_one():
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
def test_decay(kind, step, expected):
    assert Schedule(kind, 1.0, 2, 10, 0.1)(step) == pytest.approx(expected)


def test_unknown_schedule():
    with pytest.raises(UsageError, match="cosine, linear, constant, wsd"):
        Schedule("exponential", 1.0, 0, 1, 0.0)


def test_detector_needs_a_full_window():
    detector = OutlierDetector()
    assert all(detector.score(float(i)) is None for i in range(WINDOW))
    assert detector.score(0.0) is not None


def test_detector_scores_against_the_window_that_holds_the_value():
    generator = np.random.default_rng(0)
    values = generator.normal(size=3 * WINDOW)
    detector = OutlierDetector()
    for i, value in enumerate(values):
        score = detector.score(value)
        if i >= WINDOW:
            window = values[i - WINDOW + 1 : i + 1]
            assert score == pytest.approx((value - window.mean()) / window.std())


def test_detector_of_equal_values():
    detector = OutlierDetector()
    for _ in range(WINDOW + 5):
        score = detector.score(1.5)
    assert score == 0.0
