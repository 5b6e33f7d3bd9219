"""Pick the next token from logits: temperature, filters, a draw."""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError, UsageError
from llmc_cli.rng import Xorshift

Logits: TypeAlias = NDArray[np.floating]
"""(V,) float32 or float64; minus infinity for what a filter has left out."""


SEED = 1337  # the C trainer's


SAFE_EXPONENT = 64.0  # sums of V float32 exponentials of up to this neither overflow nor vanish


SMALLEST = 1e-37  # that float32 can divide by, not far below anything that makes a difference


@dataclass(frozen=True)
class Settings:
    """How tokens are picked.

    The logits are divided by ``temperature`` (0: the most likely token, nothing drawn); then each filter works on what
    the one before has left: the ``top_k`` most likely (0: all), the fewest most likely that together have probability
    ``top_p`` (1: all), those at least ``min_p`` times as likely as the most likely one (0: all). Sample i draws from
    ``generator(seed, i)``. Raises UsageError for values out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = SEED

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


def scale(logits: Logits, temperature: float) -> Logits:
    """The logits, counted from the largest, divided by ``temperature`` > 0; 1 leaves them as they are."""
    if temperature == 1:
        return logits
    with np.errstate(over="ignore"):  # minus infinity is what a quotient beyond float's range should become
        scaled: Logits = (logits - logits.max()) / max(temperature, SMALLEST)
    return scaled


def keep_top_k(logits: Logits, k: int) -> Logits:
    """The ``k`` largest logits, the rest minus infinity. Of equal ones at the border those with lower ids stay."""
    if k >= len(logits):
        return logits
    border = np.partition(logits, -k)[-k]
    kept = np.flatnonzero(logits > border)
    equal = np.flatnonzero(logits == border)[: k - len(kept)]
    return _only(logits, np.concatenate([kept, equal]))


def keep_top_p(logits: Logits, p: float) -> Logits:
    """The fewest of the largest logits whose probabilities add up to ``p`` or more, the rest minus infinity.

    Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751. Of equal ones those with lower ids come first.
    """
    ids = np.flatnonzero(logits > -np.inf)
    probabilities = np.exp(logits[ids].astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    # of n, those below (1-p)/n add up to less than 1-p: the nucleus lies above, only that is sorted (half: rounding)
    likely = np.flatnonzero(probabilities > (1 - p) / (2 * len(ids)))
    order = likely[np.argsort(-logits[ids[likely]], kind="stable")]  # probabilities that round alike may differ here
    count = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    return _only(logits, ids[order[:count]])


def keep_min_p(logits: Logits, p: float) -> Logits:
    """The logits whose probability is at least ``p`` > 0 times the largest, the rest minus infinity.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    return np.where(logits >= logits.max() + math.log(p), logits, -np.inf)


def _only(logits: Logits, ids: NDArray[np.int64]) -> Logits:
    kept = np.full_like(logits, -np.inf)
    kept[ids] = logits[ids]
    return kept


def filtered(logits: Logits, settings: Settings) -> Logits:
    """``logits`` as ``settings`` with a temperature above 0 leave them."""
    logits = scale(logits, settings.temperature)
    if settings.top_k:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p > 0:
        logits = keep_min_p(logits, settings.min_p)
    return logits


def pick(logits: Logits, coin: float) -> int:
    """The id that ``coin``, in [0, 1), falls on when the V probabilities are laid out in order.

    The C trainer's rule and arithmetic, so that the same logits and coins give the same tokens: coin · Σ exp(logit),
    summed in double precision and rounded to float32, against the running sum in float32. It does not subtract the
    maximum first, and here that is done only where the exponentials would leave float32's range.
    """
    top = float(logits.max())
    shifted = logits - top if abs(top) > SAFE_EXPONENT else logits
    weights = np.exp(shifted.astype(np.float32, copy=False))
    threshold = np.float32(coin * float(weights.sum(dtype=np.float64)))
    token = int(np.searchsorted(np.cumsum(weights), threshold, side="right"))
    # rounding may leave the coin at the very end, behind every sum: the last candidate then
    return token if token < len(logits) else int(np.flatnonzero(logits > -np.inf)[-1])


def choose(logits: Logits, settings: Settings, coins: Xorshift) -> int:
    """The next token's id; draws one coin, or none at temperature 0. DataError where logits are NaN or infinite."""
    logits = logits.astype(np.float32, copy=False)  # whatever the backend, the C trainer's arithmetic
    best = int(np.argmax(logits))  # the first of equal ones; a NaN where there is one
    if not math.isfinite(logits[best]):
        raise DataError("the model's logits are not finite; look for NaN or inf in its file with `llmc verify`")
    return pick(filtered(logits, settings), coins.uniform()) if settings.temperature else best


def generator(seed: int, sample: int) -> Xorshift:
    """The coins of one sample, whatever other samples there are.

    Sample 0 draws from ``seed`` itself, as the C trainer does; the others from states that SplitMix64 (Steele et al.
    2014) makes of seed and number, since neighbouring states of xorshift start alike. So does seed 0, which xorshift
    never leaves.
    """
    if sample == 0 and seed:
        return Xorshift(seed)
    mask = Xorshift.MASK
    z = (seed + (sample + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return Xorshift(z ^ z >> 31)
