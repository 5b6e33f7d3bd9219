"""Outlier detection for losses and gradient norms."""

import math
from dataclasses import dataclass, field

WINDOW = 128


@dataclass
class OutlierDetector:
    """How far a value lies from the last ``WINDOW`` ones, in standard deviations."""

    values: list[float] = field(default_factory=list)
    oldest: int = 0

    def score(self, value: float) -> float | None:
        """Take ``value`` in; its z-score among the window that it now belongs to, None until the window is full."""
        if len(self.values) < WINDOW:
            self.values.append(value)
            return None
        self.values[self.oldest] = value
        self.oldest = (self.oldest + 1) % WINDOW
        mean = math.fsum(self.values) / WINDOW
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.values) / WINDOW)
        return (value - mean) / deviation if deviation else 0.0
