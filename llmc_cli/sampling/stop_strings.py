"""Stop strings: found across token boundaries, and never emitted in part."""

from collections.abc import Iterator, Sequence

from llmc_cli.errors import DataError, UsageError
from llmc_cli.tokenizer.base import Tokenizer


class StopStringMatcher:
    """Search a stream of tokens for stop strings, holding back tokens that may be the start of one.

    The search compares bytes, because a token may end inside a character. Raises UsageError for an empty stop string,
    and for any stop string without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        if stop_strings and tokenizer is None:
            raise UsageError("--stop needs the model's tokenizer; give --tokenizer")
        if "" in stop_strings:
            raise UsageError("--stop: expected a text that is not empty")
        self._tokenizer, self._stops = tokenizer, [stop.encode() for stop in stop_strings]
        self._pending: list[tuple[int, bytes]] = []

    def feed(self, token: int) -> tuple[list[int], bool]:
        """Add a token. Return the ids that can be emitted now, and whether a stop string was found.

        Once a stop string is found, the ids returned so far spell exactly the text before it, and no more tokens may be
        fed.
        """
        if self._tokenizer is None or not self._stops:
            return [token], False
        content = b"" if token in self._tokenizer.special else self._tokenizer.decode_bytes([token])
        self._pending.append((token, content))
        text = b"".join(content for _, content in self._pending)
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            ids, start = self._release(min(found))
            return [*ids, *encode_longest_match(text[start : min(found)], self._tokenizer)], True
        return self._release(len(text) - max(_partial_match(text, stop) for stop in self._stops))[0], False

    def finish(self) -> list[int]:
        """Return the ids still held back, for a stream that ends without a stop string."""
        ids, self._pending = [token for token, _ in self._pending], []
        return ids

    def _release(self, end: int) -> tuple[list[int], int]:
        """Remove the tokens that lie entirely within the first ``end`` bytes; return their ids and their length."""
        ids, start = [], 0
        while self._pending and start + len(self._pending[0][1]) <= end:
            token, content = self._pending.pop(0)
            ids.append(token)
            start += len(content)
        return ids, start


def _partial_match(text: bytes, stop: bytes) -> int:
    """Return the length of the longest proper prefix of ``stop`` that ``text`` ends with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def encode_longest_match(content: bytes, tokenizer: Tokenizer) -> Iterator[int]:
    """Encode bytes by taking the longest matching token at each position. Special tokens are not used.

    Raises DataError if the vocabulary lacks a byte; byte-level tokenizers have all 256.
    """
    if not content:
        return
    ids = {token: id for id, token in enumerate(tokenizer.tokens) if token and id not in tokenizer.special}
    longest, start = max(map(len, ids)), 0
    while start < len(content):
        ends = range(min(len(content), start + longest), start, -1)
        match = next((content[start:end] for end in ends if content[start:end] in ids), None)
        if match is None:
            raise DataError(
                f"{tokenizer.name}: no token for byte {content[start : start + 1]!r}, found before a stop string"
            )
        yield ids[match]
        start += len(match)
