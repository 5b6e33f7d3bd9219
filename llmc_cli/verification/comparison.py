"""How far numbers are from what they should be, and whether that is too far."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20
"""Elements compared at a time."""


@dataclass(frozen=True)
class Check:
    """One comparison. ``ok`` is made so that a NaN or infinity anywhere, found or expected, fails."""

    name: str  # of a tensor or kernel
    what: str  # about it was compared
    largest: float  # max|expected|
    max_error: float
    mean_error: float
    bound: float  # on max_error

    @property
    def ok(self) -> bool:
        return math.isfinite(self.largest) and self.max_error <= self.bound

    @property
    def badness(self) -> float:
        """The error in units of the bound: above 1 is too much, infinity for a NaN or infinity."""
        if not math.isfinite(self.largest) or not math.isfinite(self.max_error):
            return math.inf
        if self.bound == 0:
            return math.inf if self.max_error else 0.0
        return self.max_error / self.bound


class Tally:
    """Adds up the differences between two arrays that come in pieces."""

    def __init__(self) -> None:
        self.largest = self.max_error = self.sum_of_errors = 0.0
        self.count = 0

    def add(self, found: NDArray[Any], expected: NDArray[Any]) -> None:
        """Compare two arrays of one shape, in float64, through a small buffer where they are C-contiguous."""
        if found.shape != expected.shape:
            raise ValueError(f"{found.shape} cannot be compared with {expected.shape}")
        flat, right = found.reshape(-1), expected.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            with np.errstate(invalid="ignore"):  # inf - inf, and NaNs that signal
                wanted = right[start : start + CHUNK].astype(np.float64)
                error = np.abs(flat[start : start + CHUNK] - wanted)
            # np.maximum hands a NaN on, max() may not
            self.largest = float(np.maximum(self.largest, np.abs(wanted).max()))
            self.max_error = float(np.maximum(self.max_error, error.max()))
            self.sum_of_errors += float(error.sum())
        self.count += flat.size

    def check(self, name: str, what: str, relative: float) -> Check:
        """The result, with ``relative`` · max|expected| as the bound."""
        mean = self.sum_of_errors / max(1, self.count)
        return Check(name, what, self.largest, self.max_error, mean, relative * self.largest)


def compare(
    name: str, what: str, found: NDArray[Any] | float, expected: NDArray[Any] | float, relative: float
) -> Check:
    """max|found - expected| against ``relative`` · max|expected|."""
    tally = Tally()
    tally.add(np.asarray(found), np.asarray(expected))
    return tally.check(name, what, relative)
