"""Outlier detection for losses and gradient norms."""

import math
from dataclasses import dataclass, field

WINDOW = 128


@dataclass
class OutlierDetector:
    """Computes the z-score of each value within a sliding window of ``WINDOW`` values."""

    values: list[float] = field(default_factory=list)
    oldest: int = 0

    def score(self, value: float) -> float | None:
        """Add ``value`` and return its z-score within the window, which includes it; None until the window is full."""
        if len(self.values) < WINDOW:
            self.values.append(value)
            return None
        self.values[self.oldest] = value
        self.oldest = (self.oldest + 1) % WINDOW
        mean = math.fsum(self.values) / WINDOW
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.values) / WINDOW)
        return (value - mean) / deviation if deviation else 0.0
