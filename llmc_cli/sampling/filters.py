"""Temperature, top-k, top-p and min-p filters, and the draw of the next token."""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.options import SamplingOptions

Logits: TypeAlias = NDArray[np.floating]
"""(V,) float32 or float64; filters set the logits of excluded tokens to minus infinity."""

SAFE_EXPONENT = 64.0  # a sum of V float32 exponentials of at most this neither overflows nor underflows to 0

MIN_TEMPERATURE = 1e-37  # the smallest divisor that is still a normal float32


def apply_temperature(logits: Logits, temperature: float) -> Logits:
    """Subtract the largest logit and divide by ``temperature`` > 0. Return the logits unchanged if it is 1."""
    if temperature == 1:
        return logits
    with np.errstate(over="ignore"):  # a quotient outside float32's range becomes minus infinity, as it should
        scaled: Logits = (logits - logits.max()) / max(temperature, MIN_TEMPERATURE)
    return scaled


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Keep the ``k`` largest logits; set the rest to minus infinity. Among equal logits the lowest ids are kept."""
    if k >= len(logits):
        return logits
    threshold = np.partition(logits, -k)[-k]
    above = np.flatnonzero(logits > threshold)
    equal = np.flatnonzero(logits == threshold)[: k - len(above)]
    return _keep_only(logits, np.concatenate([above, equal]))


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Keep the smallest set of largest logits with a total probability of at least ``p``; set the rest to -inf.

    Nucleus sampling: Holtzman et al. 2020, arXiv:1904.09751. Among equal logits the lowest ids come first.
    """
    ids = np.flatnonzero(logits > -np.inf)
    probabilities = np.exp(logits[ids].astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    # The n probabilities below (1-p)/n add up to less than 1-p, so the nucleus lies above them and only the others need
    # sorting. The factor 2 allows for rounding.
    likely = np.flatnonzero(probabilities > (1 - p) / (2 * len(ids)))
    order = likely[np.argsort(-logits[ids[likely]], kind="stable")]  # by logit: different ones may round to equal p
    count = int(np.searchsorted(np.cumsum(probabilities[order]), p)) + 1
    return _keep_only(logits, ids[order[:count]])


def keep_min_p(logits: Logits, p: float) -> Logits:
    """Keep the logits whose probability is at least ``p`` > 0 times the largest one; set the rest to -inf.

    Nguyen et al. 2024, arXiv:2407.01082.
    """
    return np.where(logits >= logits.max() + math.log(p), logits, -np.inf)


def _keep_only(logits: Logits, ids: NDArray[np.int64]) -> Logits:
    filtered = np.full_like(logits, -np.inf)
    filtered[ids] = logits[ids]
    return filtered


def apply_filters(logits: Logits, options: SamplingOptions) -> Logits:
    """Apply the temperature, which must be above 0, and then each filter that is enabled."""
    logits = apply_temperature(logits, options.temperature)
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p > 0:
        logits = keep_min_p(logits, options.min_p)
    return logits


def sample_softmax(logits: Logits, coin: float) -> int:
    """Sample an id from softmax(logits) by inverting its cumulative distribution at ``coin`` in [0, 1).

    The arithmetic is that of llm.c's ``sample_softmax``, so equal logits and coins give equal tokens: coin times the
    sum of exp(logit), added up in float64 and rounded to float32, is compared with the running sum in float32. Like
    llm.c it does not subtract the maximum, except where the exponentials would leave float32's range.
    """
    largest = float(logits.max())
    shifted = logits - largest if abs(largest) > SAFE_EXPONENT else logits
    weights = np.exp(shifted.astype(np.float32, copy=False))
    threshold = np.float32(coin * float(weights.sum(dtype=np.float64)))
    token = int(np.searchsorted(np.cumsum(weights), threshold, side="right"))
    # Rounding can put the threshold above the last running sum: return the last token that was not filtered out.
    return token if token < len(logits) else int(np.flatnonzero(logits > -np.inf)[-1])


def sample_token(logits: Logits, options: SamplingOptions, generator: Xorshift) -> int:
    """Return the next token's id.

    Draws one random number, or none at temperature 0. Raises DataError if logits are NaN or infinite.
    """
    logits = logits.astype(np.float32, copy=False)  # llm.c's arithmetic on every backend
    best = int(np.argmax(logits))  # the first of equal logits; a NaN if there is one
    if not math.isfinite(logits[best]):
        raise DataError("the model's logits are not finite; check its file for NaN or inf with `llmc verify`")
    if not options.temperature:
        return best
    return sample_softmax(apply_filters(logits, options), generator.uniform())


def sample_generator(seed: int, sample: int) -> Xorshift:
    """Return the random generator of one sample. It does not depend on the number of samples.

    Sample 0 starts from ``seed`` itself, as llm.c does. Other samples start from SplitMix64 (Steele et al. 2014) of
    seed and sample number, because xorshift's first outputs from neighboring states are similar. So does seed 0, which
    is a fixed point of xorshift.
    """
    if sample == 0 and seed:
        return Xorshift(seed)
    mask = Xorshift.MASK
    z = (seed + (sample + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return Xorshift(z ^ z >> 31)
