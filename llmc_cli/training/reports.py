"""What a training run reports."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """One update. ``step`` counts from 1, ``norm`` is that of the gradients before clipping; ``skipped`` says why
    the update was left out."""

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
    """Tokens that the model made behind an end-of-text after ``step`` updates."""

    step: int
    ids: list[int]

    def metrics(self) -> dict[str, Any]:
        return {"step": self.step, "sample": self.ids}


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint of ``step`` updates now stands at ``path``."""

    step: int
    path: Path

    def metrics(self) -> dict[str, Any]:
        return {"step": self.step, "checkpoint": str(self.path)}


Report = StepReport | ValidationReport | SampleReport | CheckpointReport
