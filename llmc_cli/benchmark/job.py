"""What one side of a contest is asked to do, as it travels to its process."""

import dataclasses
import json
from dataclasses import dataclass

from llmc_cli.models.config import ModelConfig


@dataclass(frozen=True)
class Work:
    """What is to be done, and by whom.

    ``side``: llmc, or a mode of PyTorch that ``measuring`` lists; ``section``: kernels, train, sample, prepro or start.
    B sequences of T positions; ``steps`` tokens at least have room behind them in ``sample``. ``precision``: of
    PyTorch's samples those that it has in common with ours, with blanks between. ``threads`` None: the side's own
    default. ``recompute``: our level in ``train`` and ``start``.
    """

    side: str
    section: str
    config: ModelConfig
    batch: int
    seq_len: int
    steps: int
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    recompute: int = 0

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_text(text: str) -> "Work":
        fields = json.loads(text)
        return Work(**{**fields, "config": ModelConfig(**fields["config"])})
