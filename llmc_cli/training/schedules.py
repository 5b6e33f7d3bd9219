"""What changes with the step: the learning rate, and which losses and norms are out of the ordinary."""

import math
from dataclasses import dataclass

from llmc_cli.errors import UsageError

SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass(frozen=True)
class Schedule:
    """The learning rate by step: ``lr`` after ``warmup`` steps, ``lr · final`` after ``steps`` (the C trainer's rules).

    wsd is warm-up, stable, decay: the last fifth goes down with 1 - sqrt (Hägele et al. 2024, arXiv:2405.18392).
    """

    kind: str
    lr: float
    warmup: int
    steps: int
    final: float

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UsageError(f"--schedule {self.kind}: there are {', '.join(SCHEDULES)}")

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, …"""
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
        return low + 0.5 * (1 + math.cos(math.pi * ratio)) * (self.lr - low)
