"""Decode a stream of token ids to text incrementally."""

import codecs
from collections.abc import Iterable

from llmc_cli.tokenizer.base import Tokenizer


class TextStream:
    """Incremental decoder: returns text as soon as the bytes form complete UTF-8 characters.

    Invalid or incomplete UTF-8 becomes U+FFFD. Special tokens are omitted unless ``show_special``. ``position`` counts
    the ids decoded so far; error messages refer to it.
    """

    def __init__(self, tokenizer: Tokenizer, show_special: bool = False, position: int = 0) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset() if show_special else tokenizer.special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.position = position

    def feed(self, ids: Iterable[int]) -> str:
        """Return the text that ``ids`` complete. Raises DataError for an id outside the vocabulary."""
        ids = list(ids)
        content = self._tokenizer.decode_bytes(ids, self.position)
        self.position += len(ids)
        if not self._hidden.isdisjoint(ids):
            content = self._tokenizer.decode_bytes(id for id in ids if id not in self._hidden)
        return self._utf8.decode(content)

    def finish(self) -> str:
        """Return U+FFFD if the last character is incomplete, else "", and reset the decoder."""
        return self._utf8.decode(b"", final=True)
