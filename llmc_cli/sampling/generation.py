"""Tokens from a model: logits, filters, a pick, one position after the other through a KV cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import UsageError
from llmc_cli.models.arena import arena_bytes
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.kv_cache import Cache, cache_shapes
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.filters import SEED, Settings, choose, generator
from llmc_cli.sampling.stop_strings import StopWatch
from llmc_cli.tokenizer.base import Tokenizer

Ending: TypeAlias = Literal["", "end-of-text", "stop", "length"]
"""Why a sample is over; empty while it is not."""

USUAL_TOKENS = 256  # made where nobody says how many, and the context has room
PROMPT_ROWS = 256  # positions of a prompt that go through the model at once: bounds the scratch memory
CACHE_BYTES = 1 << 30  # of the sequences that go through the model together
MOST_TOGETHER = 32


@dataclass(frozen=True)
class Piece:
    """The next tokens of one sample, and whether they are its last."""

    sample: int
    ids: list[int]
    ending: Ending


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
