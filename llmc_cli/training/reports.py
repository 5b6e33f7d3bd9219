"""The reports that a training run yields."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """A step, counted from 1. ``norm``: gradient norm before clipping; ``skipped``: the reason of a skipped update."""

    step: int
    steps: int
    loss: float
    norm: float
    lr: float
    ms: float
    tokens_per_s: float
    mfu: float
    skipped: str | None = None

    def metrics(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["steps"]
        if self.skipped is None:
            del fields["skipped"]
        return fields


@dataclass(frozen=True)
class ValidationReport:
    """The mean loss on the validation data after ``step`` updates."""

    step: int
    val_loss: float

    def metrics(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SampleReport:
    """Tokens sampled from the model after ``step`` updates, starting from end-of-text."""

    step: int
    ids: list[int]

    def metrics(self) -> dict[str, Any]:
        return {"step": self.step, "sample": self.ids}


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint was written after ``step`` updates; ``path`` is its model file."""

    step: int
    path: Path

    def metrics(self) -> dict[str, Any]:
        return {"step": self.step, "checkpoint": str(self.path)}


Report = StepReport | ValidationReport | SampleReport | CheckpointReport
