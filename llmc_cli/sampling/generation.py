"""Generate tokens with a KV cache: prefill the prompt, then decode one position at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import UsageError
from llmc_cli.models.arena import arena_bytes
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.kv_cache import KVCache, cache_shapes
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.filters import sample_generator, sample_token
from llmc_cli.sampling.options import DEFAULT_MAX_TOKENS, DEFAULT_SEED, SamplingOptions
from llmc_cli.sampling.stop_strings import StopStringMatcher
from llmc_cli.tokenizer.base import Tokenizer

FinishReason: TypeAlias = Literal["", "end-of-text", "stop", "length"]
"""Why a sample ended; empty while it is running."""

PREFILL_CHUNK = 256  # prompt positions per forward pass: bounds the scratch memory
MAX_CACHE_BYTES = 1 << 30  # of the sequences of one batch
MAX_BATCH = 32  # sequences


@dataclass(frozen=True)
class SampleChunk:
    """The next tokens of one sample. The last chunk of a sample has a finish reason."""

    sample: int
    ids: list[int]
    finish_reason: FinishReason


class Decoder:
    """Computes the next-token logits of a cache's S sequences, in memory allocated once.

    ``step`` records its operations with ``Kernels.record``; a GPU backend replays them as one CUDA graph.
    """

    def __init__(self, model: GPT2, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        self._ids = np.zeros((cache.S, 1), np.int32)
        logits = self._logits = model.kernels.alloc((cache.S, model.config.vocab_size), model.kernels.dtype)

        # A closure over ``self`` would be a reference cycle, which would delay freeing the cache.
        def decode_token() -> None:
            model.kernels.head_logits(logits, model.forward_cached(cache, 1), model.head)

        self._decode_token = model.kernels.record(decode_token)

    def prefill(self, prompt: Sequence[int]) -> NDArray[np.floating]:
        """Return the logits (1,V) after a prompt, for a cache of one sequence. The next call overwrites them."""
        ids = np.array([prompt], np.int32)  # (1, T)
        for start in range(0, ids.shape[1], PREFILL_CHUNK):
            hidden = self.model.extend(self.cache, ids[:, start : start + PREFILL_CHUNK])  # (1, T, C)
        self.model.kernels.head_logits(self._logits, hidden.reshape(-1, hidden.shape[-1])[-1:], self.model.head)
        return self.model.kernels.download(self._logits)

    def step(self, tokens: Sequence[int]) -> NDArray[np.floating]:
        """Return the logits (S,V) after one more token (S,) per sequence. The next call overwrites them."""
        self._ids[:, 0] = tokens
        self.cache.append(self._ids)
        self._decode_token()
        return self.model.kernels.download(self._logits)


def sample_tokens(
    model: GPT2, cache: KVCache, end_of_text: int, num_tokens: int, seed: int = DEFAULT_SEED
) -> list[int]:
    """Return the sample that llm.c's trainer prints: ``num_tokens`` - 1 tokens that follow an end-of-text token.

    The end-of-text token itself is not included, and a later one does not end the sample. Temperature is 1, without
    filters. ``cache`` holds one sequence of at least ``num_tokens`` positions; it is emptied first. Each call starts a
    new generator from ``seed``.
    """
    cache.lengths[:] = 0
    decoder, generator, options, token = Decoder(model, cache), Xorshift(seed), SamplingOptions(), end_of_text
    tokens = []
    for _ in range(num_tokens - 1):
        token = sample_token(decoder.step([token])[0], options, generator)
        tokens.append(token)
    return tokens


def resolve_max_tokens(config: ModelConfig, prompt: Sequence[int], max_tokens: int | None) -> int:
    """Return how many tokens to generate; by default what fits into the context, at most ``DEFAULT_MAX_TOKENS``.

    Raises UsageError if prompt and tokens exceed the context, or if the prompt is empty or has ids outside the
    vocabulary.
    """
    T, used = config.max_seq_len, len(prompt)
    if not used:
        raise UsageError("the prompt is empty; give PROMPT or --prompt-ids")
    for token in prompt:
        if not 0 <= token < config.vocab_size:
            raise UsageError(
                f"prompt: token id {token} is outside the model's vocabulary, 0 to {config.vocab_size - 1}"
            )
    if used >= T:
        raise UsageError(f"the prompt's {used} tokens leave no room in the model's context of {T}; shorten it")
    if max_tokens is None:
        return min(T - used, DEFAULT_MAX_TOKENS)
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
    options: SamplingOptions,
    max_tokens: int | None = None,
    num: int = 1,
    tokenizer: Tokenizer | None = None,
    stop_strings: Sequence[str] = (),
) -> Iterator[SampleChunk]:
    """Yield ``num`` continuations of ``prompt`` in chunks, as they are generated.

    A sample ends before the tokenizer's end-of-text token (ignored without a tokenizer), before the first stop string,
    or after ``max_tokens`` (default: see ``resolve_max_tokens``). Tokens that may be the start of a stop string are
    held back. If a stop string starts inside a token, tokens for the text before it replace that token.

    Samples are decoded in batches that bound the memory of the KV cache. A sample's random numbers do not depend on
    ``num``, but a backend may round matrix products differently for other batch sizes. Raises UsageError when called,
    and DataError during the iteration if logits are not finite.
    """
    max_tokens = resolve_max_tokens(model.config, prompt, max_tokens)
    matchers = [StopStringMatcher(tokenizer, stop_strings) for _ in range(num)]
    return _generate(model, prompt, options, max_tokens, matchers, tokenizer.end_of_text if tokenizer else -1)


def _generate(
    model: GPT2,
    prompt: Sequence[int],
    options: SamplingOptions,
    max_tokens: int,
    matchers: list[StopStringMatcher],
    end_of_text: int,
) -> Iterator[SampleChunk]:
    num, length = len(matchers), len(prompt) + max_tokens - 1  # the last token is never fed back
    batch_size = min(num, MAX_BATCH, max(1, MAX_CACHE_BYTES // _cache_bytes(model, length)))
    prompt_positions = length if batch_size == 1 else len(prompt)
    prompt_cache = KVCache(model.config, model.kernels, 1, prompt_positions, min(len(prompt), PREFILL_CHUNK))
    decoder = Decoder(model, prompt_cache)
    logits = decoder.prefill(prompt).copy()  # (1, V), the same for every sample
    for start in range(0, num, batch_size):
        samples = range(start, min(start + batch_size, num))
        if batch_size == 1:
            prompt_cache.lengths[:] = len(prompt)
        else:
            cache = KVCache(model.config, model.kernels, len(samples), length, len(samples))
            cache.copy_prompt(prompt_cache)
            decoder = Decoder(model, cache)
        yield from _generate_batch(decoder, logits, samples, options, max_tokens, matchers, end_of_text)


def _cache_bytes(model: GPT2, T: int) -> int:
    return arena_bytes(cache_shapes(model.config, 1, T), model.kernels.activation_dtype)


def _generate_batch(
    decoder: Decoder,
    logits: NDArray[np.floating],
    samples: range,
    options: SamplingOptions,
    max_tokens: int,
    matchers: list[StopStringMatcher],
    end_of_text: int,
) -> Iterator[SampleChunk]:
    """Yield the chunks of ``samples``, given the logits (1,V) after their common prompt."""
    generators = [sample_generator(options.seed, sample) for sample in samples]
    tokens = [0] * len(samples)  # finished rows repeat their last token; the output is discarded
    running = list(range(len(samples)))
    logits = np.broadcast_to(logits, (len(samples), logits.shape[1]))
    for remaining in range(max_tokens - 1, -1, -1):
        for row in tuple(running):
            token = tokens[row] = sample_token(logits[row], options, generators[row])
            ids, finish_reason = _accept(matchers[samples[row]], token, token == end_of_text, remaining == 0)
            if finish_reason:
                running.remove(row)
            if ids or finish_reason:
                yield SampleChunk(samples[row], ids, finish_reason)
        if not running or not remaining:
            return
        logits = decoder.step(tokens)


def _accept(matcher: StopStringMatcher, token: int, is_end: bool, is_last: bool) -> tuple[list[int], FinishReason]:
    """Feed a token to the matcher. Return the ids to emit, and the finish reason if the sample ends here."""
    if is_end:
        return matcher.finish(), "end-of-text"
    ids, stopped = matcher.feed(token)
    if stopped:
        return ids, "stop"
    return (ids + matcher.finish(), "length") if is_last else (ids, "")
