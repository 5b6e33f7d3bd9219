"""The options of a training run."""

from dataclasses import dataclass
from pathlib import Path

from llmc_cli.errors import UsageError

SMALLEST, LARGEST = 1e-37, 1e38  # what float32 holds, about


RANGES = {
    "lr": (0.0, LARGEST),
    "lr_final": (0.0, LARGEST),
    "weight_decay": (0.0, LARGEST),
    "beta1": (0.0, 0.999999),
    "beta2": (0.0, 0.999999),
    "eps": (SMALLEST, LARGEST),  # at 0, parameters without gradients, as the padding, would become NaN
    "clip": (0.0, LARGEST),
    "skip_loss_z": (0.0, LARGEST),
    "skip_grad_z": (0.0, LARGEST),
}
"""From where to where an option makes sense; NaN never does."""


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``llmc train``, named as there; 0 or None switches a feature off."""

    model: str
    data: str
    val_data: str
    out: Path | None = None
    checkpoint_every: int = 0
    keep: int = 0
    major_every: int = 0
    resume: bool = False
    force: bool = False
    batch: int = 4
    seq_len: int = 1024
    total_batch: int | None = None
    steps: int | None = None
    schedule: str = "cosine"
    lr: float = 3e-4
    warmup: int = 0
    lr_final: float = 1.0
    weight_decay: float = 0.0
    skip_loss_z: float = 0.0
    skip_grad_z: float = 0.0
    val_every: int = 20
    val_steps: int = 20
    sample_every: int = 20
    sample_tokens: int = 64
    overfit: bool = False
    master_weights: bool = True
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    recompute: int = 2
    shuffle: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"--{name.replace('_', '-')} {value:g}: expected {low:g} to {high:g}")
