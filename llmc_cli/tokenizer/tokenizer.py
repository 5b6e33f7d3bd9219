"""Text to token ids and back.

Three kinds: GPT-2's own byte-level BPE from the vocabulary that ships with the program, a ``tokenizer.json`` of Hugging
Face's library, and the binary table that llm.c reads, which only decodes.
"""

import hashlib
import importlib.resources
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.vocabulary import read_vocabulary, write_vocabulary

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
GPT2_TABLE = "gpt2_tokenizer.bin"
GPT2_SHA256 = "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts text into the pieces that BPE then works on (Radford et al. 2019)."""

END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""What the end-of-text token of a ``tokenizer.json`` may be called where no ``tokenizer_config.json`` says so."""


def _byte_of_char() -> dict[str, int]:
    """The byte behind each character that a byte-level vocabulary is spelled with: those printable in Latin-1 stand for
    themselves, the others are U+0100 and on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_CHAR = _byte_of_char()


class Tokenizer(ABC):
    """A vocabulary, and a way to encode with it.

    ``tokens``: the bytes of each id (those of unused ids are empty). ``end_of_text``: the id before each document.
    ``special``: the ids that are no text, end-of-text among them.
    """

    def __init__(self, name: str, tokens: tuple[bytes, ...], end_of_text: int, special: frozenset[int]) -> None:
        self.name, self.tokens, self.end_of_text, self.special = name, tokens, end_of_text, special

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @abstractmethod
    def encode(self, text: str) -> NDArray[np.int32]:
        """The ids of ``text``. What looks like a special token in it is encoded as the ordinary text that it is."""

    def decode_bytes(self, ids: Iterable[int], position: int = 0) -> bytes:
        """The bytes of ``ids``, the first of which is number ``position`` of a longer stream.

        Raises DataError naming an id that is outside the vocabulary, and its position.
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


class Gpt2Tokenizer(Tokenizer):
    """GPT-2's BPE, computed by tiktoken from the bundled table, whose ids are the ranks of the merges."""

    def __init__(self) -> None:
        import tiktoken

        with importlib.resources.as_file(importlib.resources.files("llmc_cli.assets") / GPT2_TABLE) as path:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != GPT2_SHA256:
                raise DataError(f"{path}: found sha256 {found}, expected {GPT2_SHA256}; install llmc again")
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


class JsonTokenizer(Tokenizer):
    """A byte-level ``tokenizer.json``, computed by the library ``tokenizers``."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            text = path.read_text("utf-8")
            content = json.loads(text)
            self._rust = tokenizers.Tokenizer.from_str(text)
        except OSError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"{path}: found no usable tokenizer.json ({error})") from None
        if "ByteLevel" not in _kinds(content.get("decoder")):
            raise DataError(
                f"{path}: found decoder {_kinds(content.get('decoder')) or 'none'}, expected ByteLevel; "
                "only byte-level tokenizers have bytes for each id"
            )
        self._rust.encode_special_tokens = True
        added = self._rust.get_added_tokens_decoder()
        spelled = {token: id for token, id in self._rust.get_vocab(with_added_tokens=False).items() if id not in added}
        tokens = [b""] * (max([*spelled.values(), *added], default=-1) + 1)
        for token, id in spelled.items():
            try:
                tokens[id] = bytes(BYTE_OF_CHAR[char] for char in token)
            except KeyError as error:
                raise DataError(f"{path}: token {token!r} (id {id}) holds {error}, which stands for no byte") from None
        for id, entry in added.items():
            tokens[id] = entry.content.encode()
        end = _end_of_text(path, self._rust)
        special = frozenset(id for id, entry in added.items() if entry.special)
        super().__init__(str(path), tuple(tokens), end, special | {end})

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.array(self._rust.encode(text, add_special_tokens=False).ids, np.int32)


class TableTokenizer(Tokenizer):
    """The binary table: bytes without merges, so it decodes only."""

    def __init__(self, path: Path) -> None:
        vocabulary = read_vocabulary(path)
        end = vocabulary.end_of_text
        super().__init__(str(path), tuple(vocabulary.tokens), end, frozenset((end,)))

    def encode(self, text: str) -> NDArray[np.int32]:
        raise UsageError(
            f"{self.name}: a tokenizer table can decode, not encode; give --tokenizer gpt2 or a tokenizer.json"
        )


def _kinds(part: Any) -> list[str]:
    """The types of a component of a ``tokenizer.json``, those inside a Sequence included."""
    if not isinstance(part, dict):
        return []
    return [str(part.get("type")), *(kind for inner in part.get("decoders", ()) for kind in _kinds(inner))]


def _end_of_text(path: Path, rust: "tokenizers.Tokenizer") -> int:
    """The id of the end-of-text token: what ``tokenizer_config.json`` beside the file says, else a well-known name."""
    names: tuple[str, ...] = END_OF_TEXT_NAMES
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            eos = json.loads(config.read_text("utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{config}: found no usable JSON object ({error})") from None
        if eos:
            names = (eos["content"] if isinstance(eos, dict) else eos,)
    for name in names:
        if (found := rust.token_to_id(name)) is not None:
            return found
    raise DataError(f"{path}: found no end-of-text token, expected one of {', '.join(names)}")


def load_tokenizer(name: str) -> Tokenizer:
    """``gpt2``, or the path of a ``tokenizer.json``, of a folder with one, or of a binary tokenizer table.

    Raises DataError or FormatError where the file is none of these, MissingError for what is not there yet.
    """
    if name == "gpt2":
        return Gpt2Tokenizer()
    if name == "llama3":
        raise MissingError("tokenizer llama3: not yet; give the path of its tokenizer.json")
    path = Path(name)
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer; expected gpt2, a tokenizer.json (or its folder), or a tokenizer table (.bin)"
        )
    return JsonTokenizer(path) if path.suffix == ".json" else TableTokenizer(path)


def write_tokenizer_table(path: str | Path, tokenizer: Tokenizer, version: int = 2) -> None:
    """The vocabulary as the binary table that llm.c reads to print text."""
    write_vocabulary(path, tokenizer.tokens, tokenizer.end_of_text, version)
