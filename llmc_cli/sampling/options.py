"""Sampling options and their validation."""

import math
from dataclasses import dataclass

from llmc_cli.errors import UsageError

DEFAULT_SEED = 1337  # as in llm.c
DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    The logits are divided by ``temperature`` (0: greedy, no random draw). Then each filter applies to what the previous
    one left: the ``top_k`` most likely tokens (0: all), the smallest set of most likely tokens with a total probability
    of at least ``top_p`` (1: all), and the tokens at least ``min_p`` times as likely as the most likely one (0: all).
    Sample i uses ``sample_generator(seed, i)``. Raises UsageError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = DEFAULT_SEED

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature {self.temperature:g}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise UsageError(f"--top-k {self.top_k}: expected 1 or more, or 0 for no limit")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p {self.top_p:g}: expected more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"--min-p {self.min_p:g}: expected 0 to 1")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"--seed {self.seed}: expected 0 to 2^64 - 1")
