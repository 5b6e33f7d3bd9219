"""Tokenizers and documents that tests share."""

import functools

import numpy as np
import tokenizers

from llmc_cli.data.documents import Piece
from llmc_cli.tokenizer.base import Tokenizer
from llmc_cli.tokenizer.huggingface import BYTE_OF_CHAR
from llmc_cli.tokenizer.tokenizer import load_tokenizer

gpt2_tokenizer = functools.cache(lambda: load_tokenizer("gpt2"))
"""GPT-2's tokenizer, loaded once per process. A function, because Hypothesis tests should not use fixtures."""


def byte_tokenizer(decoder=None, specials=("<|endoftext|>",), vocab=None):
    """Return a byte-level tokenizer of the ``tokenizers`` library without merges."""
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocab or dict(BYTE_OF_CHAR), []))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoder or tokenizers.decoders.ByteLevel()
    rust.add_special_tokens(list(specials))
    return rust


class LetterTokenizer(Tokenizer):
    """Encodes each letter as one id: a = 1, b = 2, …; end-of-text is 0."""

    def __init__(self, vocab_size=27):
        super().__init__("letters", (b"\0",) * vocab_size, 0, frozenset((0,)))

    def encode(self, text):
        return np.array([ord(char) - ord("a") + 1 for char in text], np.int32)


def documents(*texts):
    """Return each text as one document."""
    return [Piece(text, True) for text in texts]
