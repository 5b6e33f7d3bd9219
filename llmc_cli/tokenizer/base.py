"""The interface that all tokenizers share."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError

END_OF_TEXT = "<|endoftext|>"


class Tokenizer(ABC):
    """A vocabulary with an encoder and a decoder.

    ``name``: the name or path that ``load_tokenizer`` accepts. ``tokens``: the bytes of each id, empty for unused ids.
    ``end_of_text``: the id written before each document. ``special``: the ids of special tokens, including end-of-text.
    """

    def __init__(self, name: str, tokens: tuple[bytes, ...], end_of_text: int, special: frozenset[int]) -> None:
        self.name, self.tokens, self.end_of_text, self.special = name, tokens, end_of_text, special

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the ids of ``text``. Special tokens that appear in the text are encoded as ordinary text."""

    def decode_bytes(self, ids: Iterable[int], position: int = 0) -> bytes:
        """Return the bytes of ``ids``. Raises DataError for an id outside the vocabulary.

        ``position`` is the position of the first id in a longer stream; error messages refer to it.
        """
        found, tokens = [], self.tokens
        for index, token in enumerate(ids):
            if not 0 <= token < len(tokens):
                raise DataError(
                    f"token id {token} at position {position + index} is outside the vocabulary of {self.name}: "
                    f"expected 0 to {len(tokens) - 1}"
                )
            found.append(tokens[token])
        return b"".join(found)
