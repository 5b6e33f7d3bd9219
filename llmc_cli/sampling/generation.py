"""Tokens from a model: logits, filters, a pick, one position after the other through a KV cache."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError, UsageError
from llmc_cli.models.arena import arena_bytes
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.kv_cache import Cache, cache_shapes
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.stop_strings import StopWatch
from llmc_cli.tokenizer.tokenizer import Tokenizer

Logits: TypeAlias = NDArray[np.floating]
"""(V,) float32 or float64; minus infinity for what a filter has left out."""

Ending: TypeAlias = Literal["", "end-of-text", "stop", "length"]
"""Why a sample is over; empty while it is not."""

SEED = 1337  # the C trainer's
USUAL_TOKENS = 256  # made where nobody says how many, and the context has room
SAFE_EXPONENT = 64.0  # sums of V float32 exponentials of up to this neither overflow nor vanish
SMALLEST = 1e-37  # that float32 can divide by, not far below anything that makes a difference
PROMPT_ROWS = 256  # positions of a prompt that go through the model at once: bounds the scratch memory
CACHE_BYTES = 1 << 30  # of the sequences that go through the model together
MOST_TOGETHER = 32


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


@dataclass(frozen=True)
class Piece:
    """The next tokens of one sample, and whether they are its last."""

    sample: int
    ids: list[int]
    ending: Ending


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


class Stepper:
    """Ids in, logits out, for a cache's S sequences, in memory made once. What a token takes is recorded: on a GPU its
    launches would take longer than what they launch."""

    def __init__(self, model: GPT2, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self._ids = np.zeros((cache.S, 1), np.int32)
        logits = self._logits = model.kernels.alloc((cache.S, model.config.vocab_size), model.kernels.dtype)

        def token() -> None:  # without this object in it, which would live in a circle then, and its memory with it
            model.kernels.head_logits(logits, model.feed(cache, 1), model.head)

        self._token = model.kernels.recorded(token)

    def read(self, prompt: Sequence[int]) -> NDArray[np.floating]:
        """The logits (1,V) behind a prompt, of one sequence; a view that the next call overwrites."""
        ids = np.array([prompt], np.int32)  # (1, T)
        for start in range(0, ids.shape[1], PROMPT_ROWS):
            hidden = self.model.extend(self.cache, ids[:, start : start + PROMPT_ROWS])  # (1, T, C)
        self.model.kernels.head_logits(self._logits, hidden.reshape(-1, hidden.shape[-1])[-1:], self.model.head)
        return self.model.kernels.download(self._logits)

    def step(self, tokens: Sequence[int]) -> NDArray[np.floating]:
        """The logits (S,V) behind one more token (S,) of each sequence; a view that the next call overwrites."""
        self._ids[:, 0] = tokens
        self.cache.put(self._ids)
        self._token()
        return self.model.kernels.download(self._logits)


def sample_tokens(model: GPT2, cache: Cache, end_of_text: int, num_tokens: int, seed: int = SEED) -> list[int]:
    """What the C trainer prints between its steps: the ``num_tokens`` - 1 tokens behind an end-of-text, which is not
    among them itself. Temperature 1, no filter, and a further end-of-text does not end it.

    ``cache`` holds one sequence of at least ``num_tokens`` positions; it is emptied first, and the generator starts
    from ``seed`` at each call.
    """
    cache.lengths[:] = 0
    stepper, coins, settings, token = Stepper(model, cache), Xorshift(seed), Settings(), end_of_text
    tokens = []
    for _ in range(num_tokens - 1):
        token = choose(stepper.step([token])[0], settings, coins)
        tokens.append(token)
    return tokens


def fit(config: ModelConfig, prompt: Sequence[int], max_tokens: int | None) -> int:
    """How many tokens to make: ``max_tokens``, by default what the context leaves, at most ``USUAL_TOKENS``.

    Raises UsageError where prompt and tokens exceed the context, or the prompt is empty or holds ids the model lacks.
    """
    T, used = config.max_seq_len, len(prompt)
    if not used:
        raise UsageError("nothing to start from: give a prompt or --prompt-ids")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise UsageError(
                f"prompt: token id {token} is outside the model's vocabulary, 0 to {config.vocab_size - 1}"
            )
    if used >= T:
        raise UsageError(f"the prompt's {used} tokens leave no room in the model's context of {T}; shorten it")
    if max_tokens is None:
        return min(T - used, USUAL_TOKENS)
    if max_tokens < 1:
        raise UsageError(f"--max-tokens {max_tokens}: expected 1 or more")
    if used + max_tokens > T:
        raise UsageError(
            f"--max-tokens {max_tokens}: with the prompt's {used} that is {used + max_tokens} tokens, but the model's "
            f"context holds {T}; expected at most {T - used}"
        )
    return max_tokens


def generate(
    model: GPT2,
    prompt: Sequence[int],
    settings: Settings,
    max_tokens: int | None = None,
    num: int = 1,
    tokenizer: Tokenizer | None = None,
    stops: Sequence[str] = (),
) -> Iterator[Piece]:
    """``num`` continuations of ``prompt``, a Piece at a time as they are made; the last of each says why it ends there.

    A sample ends before the tokenizer's end-of-text (without a tokenizer there is none), before the first stop text,
    or after ``max_tokens`` (as ``fit`` has it). Tokens that may begin a stop text come once it is known that they do
    not; the token that a stop text begins in the middle of is replaced by tokens that spell what stands before it.
    Samples go through the model together in groups that bound the caches' memory. A sample's coins do not depend on
    ``num``, though the rounding of a backend's matrix products may depend on the size of the group. Raises UsageError
    at once, and DataError while it runs where logits are not finite.
    """
    max_tokens = fit(model.config, prompt, max_tokens)
    watches = [StopWatch(tokenizer, stops) for _ in range(num)]
    return _generate(model, prompt, settings, max_tokens, watches, tokenizer.end_of_text if tokenizer else -1)


def _generate(
    model: GPT2, prompt: Sequence[int], settings: Settings, max_tokens: int, watches: list[StopWatch], end_of_text: int
) -> Iterator[Piece]:
    num, length = len(watches), len(prompt) + max_tokens - 1  # the last token is not fed
    together = min(num, MOST_TOGETHER, max(1, CACHE_BYTES // _cache_bytes(model, length)))
    first = Cache(model, 1, length if together == 1 else len(prompt), min(len(prompt), PROMPT_ROWS))
    stepper = Stepper(model, first)
    logits = stepper.read(prompt).copy()  # (1, V), the start of every sample
    for start in range(0, num, together):
        samples = range(start, min(start + together, num))
        if together == 1:
            first.lengths[:] = len(prompt)
        else:
            cache = Cache(model, len(samples), length, len(samples))
            cache.share(first)
            stepper = Stepper(model, cache)
        yield from _group(stepper, logits, samples, settings, max_tokens, watches, end_of_text)


def _cache_bytes(model: GPT2, T: int) -> int:
    return arena_bytes(cache_shapes(model.config, 1, T), model.kernels.activation_dtype)


def _group(
    stepper: Stepper,
    logits: NDArray[np.floating],
    samples: range,
    settings: Settings,
    max_tokens: int,
    watches: list[StopWatch],
    end_of_text: int,
) -> Iterator[Piece]:
    """The pieces of ``samples``, from the logits (1,V) behind their common prompt."""
    coins = [generator(settings.seed, sample) for sample in samples]
    tokens = [0] * len(samples)  # a sample that has ended goes on eating its last token, unheard
    running = list(range(len(samples)))
    logits = np.broadcast_to(logits, (len(samples), logits.shape[1]))
    for left in range(max_tokens - 1, -1, -1):
        for row in tuple(running):
            token = tokens[row] = choose(logits[row], settings, coins[row])
            watch = watches[samples[row]]
            ids, ending = _take(watch, token, token == end_of_text, left == 0)
            if ending:
                running.remove(row)
            if ids or ending:
                yield Piece(samples[row], ids, ending)
        if not running or not left:
            return
        logits = stepper.step(tokens)


def _take(watch: StopWatch, token: int, end: bool, last: bool) -> tuple[list[int], Ending]:
    """What one more token sets free, and whether it ends the sample."""
    if end:
        return watch.finish(), "end-of-text"
    ids, stopped = watch.feed(token)
    if stopped:
        return ids, "stop"
    return (ids + watch.finish(), "length") if last else (ids, "")
