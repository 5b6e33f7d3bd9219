"""Tokenizers that tests share."""

import functools

import tokenizers

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
