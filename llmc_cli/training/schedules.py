"""Learning rate schedules."""

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warmup to ``lr`` in ``warmup`` steps, then decay to ``lr · final`` at ``steps``.

    The formulas are llm.c's. wsd is warmup, stable, decay: the last fifth decays with 1 - sqrt (Hägele et al. 2024,
    arXiv:2405.18392). constant has no warmup.
    """

    kind: str
    lr: float
    warmup: int
    steps: int
    final: float

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if self.kind == "constant":
            return self.lr
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        low = self.lr * self.final
        if self.kind == "wsd":
            decay_from = int(0.8 * self.steps)
            if step < decay_from:
                return self.lr
            return low + (1 - math.sqrt((step - decay_from) / (self.steps - decay_from))) * (self.lr - low)
        ratio = (step - self.warmup) / (self.steps - self.warmup)
        if self.kind == "linear":
            return self.lr - ratio * (self.lr - low)
        if self.kind == "cosine":
            return low + 0.5 * (1 + math.cos(math.pi * ratio)) * (self.lr - low)
        raise ValueError(f"unknown schedule {self.kind!r}: expected one of {', '.join(SCHEDULES)}")
