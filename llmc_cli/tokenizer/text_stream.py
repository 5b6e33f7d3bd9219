"""Decode a stream of tokens into text."""

import codecs
from collections.abc import Iterable

from llmc_cli.tokenizer.tokenizer import Tokenizer


class TextStream:
    """Ids to text, as far as their bytes complete UTF-8; what never does becomes U+FFFD.

    Special tokens give no text unless ``show_special``. ``position`` counts the ids, for the message about a bad one.
    """

    def __init__(self, tokenizer: Tokenizer, show_special: bool = False, position: int = 0) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if show_special else tokenizer.special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.position = position

    def feed(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete. Raises DataError for an id outside the vocabulary."""
        ids = list(ids)
        content = self._tokenizer.decode_bytes(ids, self.position)
        self.position += len(ids)
        if not self._hidden.isdisjoint(ids):
            content = self._tokenizer.decode_bytes(id for id in ids if id not in self._hidden)
        return self._utf8.decode(content)

    def finish(self) -> str:
        """What is left of a character that never completed; the stream then starts anew behind it."""
        return self._utf8.decode(b"", final=True)
