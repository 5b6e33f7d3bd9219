"""Hugging Face tokenizer files: read a ``tokenizer.json``, and write GPT-2's tokenizer as one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError
from llmc_cli.tokenizer.base import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")
"""Names tried for the end-of-text token when no ``tokenizer_config.json`` names it."""


def _byte_of_char() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary represents.

    Bytes that are printable in Latin-1 represent themselves; the others are mapped in order to U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_CHAR = _byte_of_char()
CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}


def token_to_text(token: bytes) -> str:
    """Return the spelling of a token in a byte-level vocabulary: one printable character per byte."""
    return "".join(CHAR_OF_BYTE[byte] for byte in token)


def text_to_token(text: str) -> bytes:
    """Invert ``token_to_text``. Raises KeyError for a character that represents no byte."""
    return bytes(BYTE_OF_CHAR[char] for char in text)


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level ``tokenizer.json``, computed by the ``tokenizers`` library."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            text = path.read_text("utf-8")
            content = json.loads(text)
            self._rust = tokenizers.Tokenizer.from_str(text)
        except OSError:
            raise
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: not a usable tokenizer.json ({error})") from None
        decoders = _component_types(content.get("decoder"))
        if "ByteLevel" not in decoders:
            raise DataError(
                f"{path}: found decoder {decoders or 'none'}, expected ByteLevel; only byte-level tokenizers are "
                "supported"
            )
        self._rust.encode_special_tokens = True
        added = self._rust.get_added_tokens_decoder()
        vocab = {token: id for token, id in self._rust.get_vocab(with_added_tokens=False).items() if id not in added}
        tokens = [b""] * (max([*vocab.values(), *added], default=-1) + 1)
        for token, id in vocab.items():
            try:
                tokens[id] = text_to_token(token)
            except KeyError as error:
                raise DataError(
                    f"{path}: token {token!r} (id {id}) contains {error}, which does not represent a byte"
                ) from None
        for id, entry in added.items():
            tokens[id] = entry.content.encode()
        end = _end_of_text_id(path, self._rust)
        special = frozenset(id for id, entry in added.items() if entry.special)
        super().__init__(str(path), tuple(tokens), end, special | {end})

    def encode(self, text: str) -> NDArray[np.int32]:
        return np.array(self._rust.encode(text, add_special_tokens=False).ids, np.int32)


def _component_types(component: Any) -> list[str]:
    """Return the type of a decoder in ``tokenizer.json``, followed by the types of the decoders in a Sequence."""
    if not isinstance(component, dict):
        return []
    inner = component.get("decoders", ())
    return [str(component.get("type")), *(name for part in inner for name in _component_types(part))]


def _end_of_text_id(path: Path, rust: "tokenizers.Tokenizer") -> int:
    """Return the id of the end-of-text token.

    Its name is the ``eos_token`` of ``tokenizer_config.json`` in the same folder, else one of END_OF_TEXT_NAMES.
    """
    names: tuple[str, ...] = END_OF_TEXT_NAMES
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            eos = json.loads(config.read_text("utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{config}: not a usable JSON object ({error})") from None
        if eos:
            names = (eos["content"] if isinstance(eos, dict) else eos,)
    for name in names:
        if (found := rust.token_to_id(name)) is not None:
            return found
    raise DataError(f"{path}: found no end-of-text token, expected one of {', '.join(names)}")


def merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Return the BPE merges in order of rank, for a tokenizer whose ids are the ranks (Sennrich et al. 2016,
    arXiv:1508.07909).

    The pair that forms a token is what remains after the earlier merges have been applied to its bytes.
    """
    ranks = {token: id for id, token in enumerate(tokenizer.tokens) if id not in tokenizer.special}
    pairs: list[tuple[bytes, bytes]] = []
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        pairs.append((parts[0], parts[1]))
    return pairs


def gpt2_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, bytes]:
    """Return the contents of ``tokenizer.json`` and ``tokenizer_config.json``, by file name, for GPT-2's tokenizer."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocab = {
        token.decode() if id in tokenizer.special else token_to_text(token): id
        for id, token in enumerate(tokenizer.tokens)
    }
    pairs = [(token_to_text(left), token_to_text(right)) for left, right in merges(tokenizer)]
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.ByteLevel(trim_offsets=False)
    rust.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=True, special=True)])
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": max_seq_len,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    return {
        "tokenizer.json": rust.to_str(pretty=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
    }
