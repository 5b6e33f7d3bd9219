"""Find a model's tokenizer and encode the prompt."""

from typing import BinaryIO

from llmc_cli.errors import DataError, UsageError
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.presets import GPT2_VOCAB_SIZE
from llmc_cli.tokenizer.base import Tokenizer
from llmc_cli.tokenizer.tokenizer import load_tokenizer


def find_tokenizer(config: ModelConfig, name: str | None) -> Tokenizer | None:
    """Return the named tokenizer; by default GPT-2's if the vocabulary has its size, otherwise None."""
    if name is None and config.vocab_size != GPT2_VOCAB_SIZE:
        return None
    return load_tokenizer(name or "gpt2")


def encode_prompt(prompt: str | BinaryIO | None, prompt_ids: str | None, tokenizer: Tokenizer | None) -> list[int]:
    """Return the ids of a prompt, given as text, as a stream of UTF-8 text, or as ids separated by whitespace.

    An empty or missing prompt becomes the end-of-text token. Raises UsageError for options that contradict each other,
    and DataError for a stream that is not UTF-8.
    """
    if prompt is not None and prompt_ids is not None:
        raise UsageError("PROMPT and --prompt-ids are mutually exclusive; give one of them")
    if prompt_ids is not None:
        return [_parse_id(word) for word in prompt_ids.split()]
    if tokenizer is None:
        raise UsageError("a text prompt and end-of-text need a tokenizer; give --prompt-ids or --tokenizer")
    if prompt is not None and not isinstance(prompt, str):
        try:
            prompt = prompt.read().decode()
        except UnicodeDecodeError as error:
            raise DataError(f"prompt from stdin: found bytes that are not UTF-8 ({error})") from None
    return tokenizer.encode(prompt).tolist() if prompt else [tokenizer.end_of_text]


def _parse_id(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UsageError(f"--prompt-ids: found {word!r}, expected token ids separated by spaces") from None
