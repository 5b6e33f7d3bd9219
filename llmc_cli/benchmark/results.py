"""Results of a benchmark."""

from dataclasses import dataclass, field
from typing import Any

from llmc_cli.benchmark.ceilings import Ceilings


@dataclass(frozen=True)
class Row:
    """The result of one task, or of one operation within a training step.

    ``seconds``, ``best``: median and minimum of ``runs`` runs. ``share``: fraction of the ceiling named ``ceiling``; 0
    and empty if none applies. ``tokens_per_s``: 0 if the task does not process tokens. ``calls``: calls of the
    operation per step. ``torch``: PyTorch's median seconds for the same task, by mode. ``launches``: GPU launches per
    step (kernels, matrix products and CUDA graphs), or per operation when run without graphs.
    """

    name: str
    seconds: float
    best: float
    runs: int
    flops_per_s: float = 0.0
    bytes_per_s: float = 0.0
    tokens_per_s: float = 0.0
    share: float = 0.0
    ceiling: str = ""
    calls: int = 0
    torch: dict[str, float] = field(default_factory=dict)
    launches: int = 0

    @property
    def ratios(self) -> dict[str, float]:
        """PyTorch's time divided by llmc's, by mode: above 1 llmc is faster."""
        return {mode: seconds / self.seconds for mode, seconds in self.torch.items()}

    @property
    def best_mode(self) -> str:
        """PyTorch's fastest mode; empty if PyTorch was not measured."""
        return min(self.torch, key=lambda mode: self.torch[mode], default="")


@dataclass(frozen=True)
class WorkerInfo:
    """A worker process of a section: its configuration and its peak memory in bytes (GPU memory on a GPU)."""

    section: str
    implementation: str
    configuration: dict[str, Any]
    peak_memory: int | None


@dataclass(frozen=True)
class SectionResult:
    """The result of one section. ``unavailable``: the PyTorch modes that could not run, with the reason."""

    rows: list[Row]
    workers: list[WorkerInfo]
    unavailable: dict[str, str] = field(default_factory=dict)


def model_flops_utilization(flops_per_s: float, ceilings: Ceilings) -> tuple[float, str]:
    """Return the MFU and its name. The peak is the published one if given, else the fastest product measured."""
    if ceilings.published is None:
        return flops_per_s / ceilings.flops, "MFU"
    return flops_per_s / ceilings.published, f"MFU of {ceilings.published / 1e12:g} TFLOP/s"


def share_of_ceiling(flops_per_s: float, bytes_per_s: float, ceilings: Ceilings) -> tuple[float, str]:
    """Return the share of the ceiling that bounds the task (the larger of the two shares) and its name."""
    return max((flops_per_s / ceilings.flops, "matmul"), (bytes_per_s / ceilings.bandwidth, "memory"))
