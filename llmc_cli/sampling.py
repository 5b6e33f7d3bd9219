"""Tokens from a model: logits, filters, a pick, one position after the other through a KV cache."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError
from llmc_cli.models.gpt2 import GPT2, Cache
from llmc_cli.random import Xorshift

Logits: TypeAlias = NDArray[np.floating]
"""(V,) float32 or float64; minus infinity for what a filter has left out."""

SEED = 1337  # the C trainer's

SAFE_EXPONENT = 64.0  # sums of V float32 exponentials of up to this neither overflow nor vanish


def greedy(logits: Logits) -> int:
    """The id of the largest logit, the first where several are equal."""
    token = int(np.argmax(logits))  # argmax finds a NaN where there is one
    _refuse_non_finite(float(logits[token]))
    return token


def pick(logits: Logits, coin: float) -> int:
    """The id that ``coin``, in [0, 1), falls on when the V probabilities are laid out in order.

    The C trainer's rule and arithmetic, so that the same logits and coins give the same tokens: coin · Σ exp(logit),
    summed in double precision and rounded to float32, against the running sum in float32. It does not subtract the
    maximum first, and here that is done only where the exponentials would leave float32's range.
    """
    top = float(logits.max())
    _refuse_non_finite(top)
    shifted = logits - top if abs(top) > SAFE_EXPONENT else logits
    weights = np.exp(shifted.astype(np.float32, copy=False))
    threshold = np.float32(coin * float(weights.sum(dtype=np.float64)))
    token = int(np.searchsorted(np.cumsum(weights), threshold, side="right"))
    # rounding may leave the coin at the very end, behind every sum: the last candidate then
    return token if token < len(logits) else int(np.flatnonzero(logits > -np.inf)[-1])


def _refuse_non_finite(top: float) -> None:
    if not np.isfinite(top):
        raise DataError("the model's logits are not finite; look for NaN or inf in its file with `llmc verify`")


class Stepper:
    """One more position for each of a cache's S sequences at a time: ids in, logits out, in memory made once."""

    def __init__(self, model: GPT2, cache: Cache) -> None:
        self.model, self.cache = model, cache
        alloc, config = model.kernels.alloc, model.config
        self._ids = alloc((cache.S, 1), np.int32)
        self._logits = alloc((cache.S, config.vocab_size), model.kernels.dtype)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.floating]:
        """The logits (S,V) behind ``tokens`` (S,); a view that the next call overwrites."""
        self._ids[:, 0] = tokens
        hidden = self.model.extend(self.cache, self._ids)  # (S, 1, C)
        self.model.kernels.head_logits(self._logits, hidden.reshape(self.cache.S, -1), self.model.head)
        view: NDArray[np.floating] = self._logits
        return view


def sample_tokens(model: GPT2, cache: Cache, end_of_text: int, num_tokens: int, seed: int = SEED) -> list[int]:
    """What the C trainer prints between its steps: the ``num_tokens`` - 1 tokens behind an end-of-text, which is not
    among them itself. Temperature 1, no filter, and a further end-of-text does not end it.

    ``cache`` holds one sequence of at least ``num_tokens`` positions; it is emptied first, and the generator starts
    from ``seed`` at each call.
    """
    cache.lengths[:] = 0
    stepper, coins, token = Stepper(model, cache), Xorshift(seed), end_of_text
    tokens = []
    for _ in range(num_tokens - 1):
        token = pick(stepper.logits([token])[0], coins.uniform())
        tokens.append(token)
    return tokens
