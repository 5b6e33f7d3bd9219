"""Texts that end a sample: found across tokens, and never let out in part."""

from collections.abc import Iterator, Sequence

from llmc_cli.errors import DataError, UsageError
from llmc_cli.tokenizer.base import Tokenizer


class StopWatch:
    """A stream of tokens, those held back that may turn out to begin one of ``stops``.

    It compares bytes, since a token may end in the middle of a character. Raises UsageError for an empty stop text, and
    for any without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        if stops and tokenizer is None:
            raise UsageError("--stop needs the model's tokenizer; give --tokenizer")
        if "" in stops:
            raise UsageError("--stop: expected a text that is not empty")
        self._tokenizer, self._stops = tokenizer, [stop.encode() for stop in stops]
        self._held: list[tuple[int, bytes]] = []

    def feed(self, token: int) -> tuple[list[int], bool]:
        """The ids set free by one more token, and whether a stop text ends the stream: nothing else may be fed then,
        and the ids spell exactly what stands before the stop text."""
        if self._tokenizer is None or not self._stops:
            return [token], False
        content = b"" if token in self._tokenizer.special else self._tokenizer.decode_bytes([token])
        self._held.append((token, content))
        text = b"".join(content for _, content in self._held)
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            ids, start = self._release(min(found))
            return [*ids, *spell(text[start : min(found)], self._tokenizer)], True
        return self._release(len(text) - max(_begun(text, stop) for stop in self._stops))[0], False

    def finish(self) -> list[int]:
        """The ids still held: the stream is over, and they began no stop text after all."""
        ids, self._held = [token for token, _ in self._held], []
        return ids

    def _release(self, end: int) -> tuple[list[int], int]:
        """Take out the tokens that lie wholly within the first ``end`` bytes; their ids, and how long they are."""
        ids, start = [], 0
        while self._held and start + len(self._held[0][1]) <= end:
            token, content = self._held.pop(0)
            ids.append(token)
            start += len(content)
        return ids, start


def _begun(text: bytes, stop: bytes) -> int:
    """The length of the longest beginning of ``stop``, less than all of it, that ``text`` ends with."""
    return next(n for n in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:n]))


def spell(content: bytes, tokenizer: Tokenizer) -> Iterator[int]:
    """Ids whose bytes are ``content``, the longest token first at each place. DataError where the vocabulary lacks a
    byte (those of byte-level tokenizers have all 256)."""
    if not content:
        return
    usual = {token: id for id, token in enumerate(tokenizer.tokens) if token and id not in tokenizer.special}
    longest, start = max(map(len, usual)), 0
    while start < len(content):
        ends = range(min(len(content), start + longest), start, -1)
        piece = next((content[start:end] for end in ends if content[start:end] in usual), None)
        if piece is None:
            raise DataError(
                f"{tokenizer.name}: no token spells {content[start : start + 1]!r}, found before a stop text"
            )
        yield usual[piece]
        start += len(piece)
