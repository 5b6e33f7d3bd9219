"""Load a tokenizer: GPT-2's byte-level BPE from the bundled vocabulary, a ``tokenizer.json``, or a tokenizer table."""

import hashlib
import importlib.resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.vocabulary import read_vocabulary, write_vocabulary
from llmc_cli.tokenizer.base import END_OF_TEXT, Tokenizer
from llmc_cli.tokenizer.huggingface import HuggingFaceTokenizer

GPT2_TABLE = "gpt2_tokenizer.bin"
GPT2_SHA256 = "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Regular expression that splits text into words before BPE (Radford et al. 2019)."""


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's BPE, computed by tiktoken from the bundled table. Its ids are also the merge ranks."""

    def __init__(self) -> None:
        import tiktoken

        with importlib.resources.as_file(importlib.resources.files("llmc_cli.assets") / GPT2_TABLE) as path:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != GPT2_SHA256:
                raise DataError(f"{path}: found SHA-256 {found}, expected {GPT2_SHA256}; reinstall llmc")
            vocabulary = read_vocabulary(path)
        end = vocabulary.end_of_text
        super().__init__("gpt2", tuple(vocabulary.tokens), end, frozenset((end,)))
        self._bpe = tiktoken.Encoding(
            "gpt2",
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens) if rank != end},
            special_tokens={END_OF_TEXT: end},
        )

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.array(self._bpe.encode_ordinary(text), np.int32)


class TableTokenizer(Tokenizer):
    """llm.c's binary tokenizer table. It stores no merges, so it can only decode."""

    def __init__(self, path: Path) -> None:
        vocabulary = read_vocabulary(path)
        end = vocabulary.end_of_text
        super().__init__(str(path), tuple(vocabulary.tokens), end, frozenset((end,)))

    def encode(self, text: str) -> NDArray[np.int32]:
        raise UsageError(
            f"{self.name}: a tokenizer table can only decode; to encode, give --tokenizer gpt2 or a tokenizer.json"
        )


def load_tokenizer(name: str) -> Tokenizer:
    """Load ``gpt2``, a ``tokenizer.json``, a folder that contains one, or a binary tokenizer table.

    Raises DataError or FormatError for any other file, MissingError for a tokenizer that is not implemented yet.
    """
    if name == "gpt2":
        return Gpt2Tokenizer()
    if name == "llama3":
        raise MissingError("tokenizer llama3: not implemented yet; give the path of its tokenizer.json")
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer; expected gpt2, a tokenizer.json (or its folder), or a tokenizer table (.bin)"
        )
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else TableTokenizer(path)


def write_tokenizer_table(path: str | Path, tokenizer: Tokenizer, version: int = 2) -> None:
    """Write the vocabulary as the binary table that llm.c reads to print text."""
    write_vocabulary(path, tokenizer.tokens, tokenizer.end_of_text, version)
