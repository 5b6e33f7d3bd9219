"""Results of a benchmark."""

from dataclasses import dataclass, field
from typing import Any

from llmc_cli.benchmark.ceilings import Ceilings


@dataclass(frozen=True)
class Row:
    """A piece of work. ``seconds``: the median of ``runs``; ``share`` of the ceiling called ``ceiling`` (0 and empty
    where none applies). ``tokens_per_s`` is 0 where no tokens are counted. ``torch``: the median seconds of PyTorch's
    modes at the same work. ``calls`` in one step, for a part of a step. ``launches``: what a GPU was asked for in a
    step, kernels, matrix products and graphs of both, or in a part of a step, where nothing is in a graph."""

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
        """How many times as long PyTorch takes, by mode: above 1 we are faster."""
        return {mode: seconds / self.seconds for mode, seconds in self.torch.items()}

    @property
    def best_mode(self) -> str:
        """PyTorch's fastest mode; empty where it did not take part."""
        return min(self.torch, key=lambda mode: self.torch[mode], default="")


@dataclass(frozen=True)
class Side:
    """A process that took part in a section: how it was set up, and the bytes of memory it held at most, of a GPU's
    memory where that computes."""

    section: str
    side: str
    configuration: dict[str, Any]
    peak_memory: int | None


@dataclass(frozen=True)
class Measured:
    """One section. ``absent``: the modes of PyTorch that could not take part, and why."""

    rows: list[Row]
    sides: list[Side]
    absent: dict[str, str] = field(default_factory=dict)


def model_flops_utilization(flops_per_s: float, ceilings: Ceilings) -> tuple[float, str]:
    """MFU, and by which peak: of the products measured here, unless another was given."""
    if ceilings.published is None:
        return flops_per_s / ceilings.flops, "MFU"
    return flops_per_s / ceilings.published, f"MFU of {ceilings.published / 1e12:g} TFLOP/s"


def share_of_ceiling(flops_per_s: float, bytes_per_s: float, ceilings: Ceilings) -> tuple[float, str]:
    """The larger of the two shares, and the name of its ceiling: that is what bounds the work."""
    return max((flops_per_s / ceilings.flops, "matmul"), (bytes_per_s / ceilings.bandwidth, "memory"))
