import math

import numpy as np
import pytest

from llmc_cli.verification import comparison
from llmc_cli.verification.comparison import Tally, compare

EXPECTED = np.array([[1.0, -4.0], [0.5, 0.0]], np.float32)


def test_bound_is_relative_to_the_largest_expected_value():
    found = EXPECTED + np.array([[0, 0], [0, 4e-3]], np.float32)
    check = compare("w", "gradient", found, EXPECTED, 2e-3)
    assert (check.largest, check.bound) == (4.0, 8e-3)
    assert check.max_error == pytest.approx(4e-3)
    assert check.mean_error == pytest.approx(1e-3)
    assert check.badness == pytest.approx(0.5)
    assert check.ok
    assert not compare("w", "gradient", found, EXPECTED, 0.9e-3).ok


def test_expected_zeros_allow_no_error():
    zeros = np.zeros(3)
    assert compare("w", "", zeros, zeros, 2e-5).ok
    wrong = compare("w", "", np.array([0, 0, 1e-30]), zeros, 2e-5)
    assert not wrong.ok
    assert wrong.badness == math.inf
    assert compare("w", "", zeros, zeros, 0.0).badness == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["found", "expected", "both"])
@pytest.mark.parametrize("index", [0, -1])
def test_nan_and_infinity_fail(monkeypatch, bad, where, index):
    monkeypatch.setattr(comparison, "CHUNK", 2)
    found, expected = EXPECTED.copy(), EXPECTED.copy()
    for array in {"found": [found], "expected": [expected], "both": [found, expected]}[where]:
        array.reshape(-1)[index] = bad
    check = compare("w", "", found, expected, 1.0)
    assert not check.ok
    assert check.badness == math.inf


def test_signaling_nan_fails_without_a_warning():
    expected = np.array([0x7FA00000], np.uint32).view(np.float32)
    assert not compare("w", "", np.ones(1, np.float32), expected, 1.0).ok


def test_tally_of_parts_equals_one_comparison():
    found = EXPECTED * np.float32(1.001)
    tally = Tally()
    for row in range(2):
        tally.add(found[row], EXPECTED[row])
    assert tally.check("w", "", 2e-5) == compare("w", "", found, EXPECTED, 2e-5)


def test_empty_arrays_are_equal():
    assert compare("w", "", np.zeros((0, 3)), np.zeros((0, 3)), 0.0).ok


def test_different_shapes_are_an_error():
    with pytest.raises(ValueError, match="shapes differ"):
        compare("w", "", np.zeros(2), np.zeros(1), 1.0)
