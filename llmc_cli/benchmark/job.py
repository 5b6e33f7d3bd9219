"""The description of a benchmark job that is passed to a worker process."""

import dataclasses
import json
from dataclasses import dataclass

from llmc_cli.models.config import ModelConfig


@dataclass(frozen=True)
class Job:
    """One section of the benchmark, run by one implementation.

    ``implementation``: "llmc" or one of the PyTorch modes in ``sections.TORCH_MODES``. ``section``: kernels, train,
    sample, prepro or start. ``batch`` sequences of ``seq_len`` positions; in ``sample`` these positions are already in
    the cache. ``steps``: timed runs. ``precision``: in PyTorch sample jobs, a space-separated list of precisions.
    ``threads`` None: the implementation's default. ``recompute``: llmc's recomputation level in ``train`` and
    ``start``.
    """

    implementation: str
    section: str
    config: ModelConfig
    batch: int
    seq_len: int
    steps: int
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    recompute: int = 0

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> "Job":
        fields = json.loads(text)
        return Job(**{**fields, "config": ModelConfig(**fields["config"])})
