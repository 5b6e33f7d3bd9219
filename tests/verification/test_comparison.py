import math

import numpy as np
import pytest

from llmc_cli.verification import comparison
from llmc_cli.verification.comparison import Tally, compare

RIGHT = np.array([[1.0, -4.0], [0.5, 0.0]], np.float32)


def test_the_bound_is_relative_to_the_largest_reference():
    found = RIGHT + np.array([[0, 0], [0, 4e-3]], np.float32)
    check = compare("w", "gradient", found, RIGHT, 2e-3)
    assert (check.largest, check.bound) == (4.0, 8e-3)
    assert check.max_error == pytest.approx(4e-3)
    assert check.mean_error == pytest.approx(1e-3)
    assert check.badness == pytest.approx(0.5)
    assert check.ok
    assert not compare("w", "gradient", found, RIGHT, 0.9e-3).ok


def test_zeros_must_be_zeros():
    zeros = np.zeros(3)
    assert compare("w", "", zeros, zeros, 2e-5).ok
    wrong = compare("w", "", np.array([0, 0, 1e-30]), zeros, 2e-5)
    assert not wrong.ok
    assert wrong.badness == math.inf
    assert compare("w", "", zeros, zeros, 0.0).badness == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["found", "expected", "both"])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_fails(monkeypatch, bad, side, place):
    monkeypatch.setattr(comparison, "CHUNK", 2)
    found, expected = RIGHT.copy(), RIGHT.copy()
    for array in {"found": [found], "expected": [expected], "both": [found, expected]}[side]:
        array.reshape(-1)[place] = bad
    check = compare("w", "", found, expected, 1.0)
    assert not check.ok
    assert check.badness == math.inf


def test_a_signalling_nan_fails_without_a_warning():
    expected = np.array([0x7FA00000], np.uint32).view(np.float32)
    assert not compare("w", "", np.ones(1, np.float32), expected, 1.0).ok


def test_pieces_add_up():
    found = RIGHT * np.float32(1.001)
    tally = Tally()
    for row in range(2):
        tally.add(found[row], RIGHT[row])
    assert tally.check("w", "", 2e-5) == compare("w", "", found, RIGHT, 2e-5)


def test_no_elements_are_no_difference():
    assert compare("w", "", np.zeros((0, 3)), np.zeros((0, 3)), 0.0).ok


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        compare("w", "", np.zeros(2), np.zeros(1), 1.0)
