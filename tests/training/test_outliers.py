import numpy as np
import pytest

from llmc_cli.training.outliers import WINDOW, OutlierDetector


def test_score_is_none_until_the_window_is_full():
    detector = OutlierDetector()
    assert all(detector.score(float(i)) is None for i in range(WINDOW))
    assert detector.score(0.0) is not None


def test_score_is_the_z_score_within_the_window():
    generator = np.random.default_rng(0)
    values = generator.normal(size=3 * WINDOW)
    detector = OutlierDetector()
    for i, value in enumerate(values):
        score = detector.score(value)
        if i >= WINDOW:
            window = values[i - WINDOW + 1 : i + 1]
            assert score == pytest.approx((value - window.mean()) / window.std())


def test_score_of_equal_values_is_zero():
    detector = OutlierDetector()
    for _ in range(WINDOW + 5):
        score = detector.score(1.5)
    assert score == 0.0
