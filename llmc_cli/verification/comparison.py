"""Compare arrays with their expected values."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 20
"""Elements compared at a time."""


@dataclass(frozen=True)
class Check:
    """The result of one comparison. It fails if any value, found or expected, is NaN or infinite."""

    name: str  # of a tensor or operation
    what: str  # the property or output compared
    largest: float  # max|expected|
    max_error: float
    mean_error: float
    bound: float  # on max_error

    @property
    def ok(self) -> bool:
        return math.isfinite(self.largest) and self.max_error <= self.bound

    @property
    def badness(self) -> float:
        """The error divided by the bound: above 1 fails; infinity if a value is NaN or infinite."""
        if not math.isfinite(self.largest) or not math.isfinite(self.max_error):
            return math.inf
        if self.bound == 0:
            return math.inf if self.max_error else 0.0
        return self.max_error / self.bound


class Tally:
    """Accumulates the differences between two arrays that are passed in parts."""

    def __init__(self) -> None:
        self.largest = self.max_error = self.sum_of_errors = 0.0
        self.count = 0

    def add(self, found: NDArray[Any], expected: NDArray[Any]) -> None:
        """Add two arrays of the same shape, compared in float64; C-contiguous arrays are not copied as a whole."""
        if found.shape != expected.shape:
            raise ValueError(f"shapes differ: found {found.shape}, expected {expected.shape}")
        flat, expected_flat = found.reshape(-1), expected.reshape(-1)
        for start in range(0, flat.size, CHUNK):
            with np.errstate(invalid="ignore"):  # inf - inf, and signaling NaNs
                reference = expected_flat[start : start + CHUNK].astype(np.float64)
                error = np.abs(flat[start : start + CHUNK] - reference)
            # np.maximum propagates NaN; max() may not
            self.largest = float(np.maximum(self.largest, np.abs(reference).max()))
            self.max_error = float(np.maximum(self.max_error, error.max()))
            self.sum_of_errors += float(error.sum())
        self.count += flat.size

    def check(self, name: str, what: str, relative: float) -> Check:
        """Return the result, with ``relative`` · max|expected| as the bound."""
        mean = self.sum_of_errors / max(1, self.count)
        return Check(name, what, self.largest, self.max_error, mean, relative * self.largest)


def compare(
    name: str, what: str, found: NDArray[Any] | float, expected: NDArray[Any] | float, relative: float
) -> Check:
    """Check that max|found - expected| ≤ ``relative`` · max|expected|."""
    tally = Tally()
    tally.add(np.asarray(found), np.asarray(expected))
    return tally.check(name, what, relative)
