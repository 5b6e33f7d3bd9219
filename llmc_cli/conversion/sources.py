"""Sources of a conversion: a model file, a Hugging Face model folder, or a model on the Hugging Face Hub."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from llmc_cli.downloads import hub
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats import weights
from llmc_cli.formats.errors import MagicError
from llmc_cli.formats.registry import Kind, identify
from llmc_cli.formats.safetensors import open_checkpoint
from llmc_cli.models import huggingface_config, huggingface_weights
from llmc_cli.models.arena import Arena
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.files import read_config
from llmc_cli.models.layout import parameter_shapes
from llmc_cli.models.presets import GPT2_VOCAB_SIZE
from llmc_cli.tokenizer.base import Tokenizer
from llmc_cli.tokenizer.tokenizer import load_tokenizer

OPENAI = re.compile(r"(openai-community/)?gpt2(-medium|-large|-xl)?")
"""Model ids on the hub whose tokenizer is the bundled GPT-2 tokenizer."""

UNSUPPORTED_KINDS = (Kind.LLAMA3_MODEL, Kind.LLAMA2C_MODEL, Kind.GGUF)
UNSUPPORTED_TYPES = ("llama",)
FILE_SUFFIXES = (".bin", ".gguf", ".safetensors", ".pt", ".pth")  # of names that are never model ids

OnProgress: TypeAlias = Callable[[str, int, int | None], None]
"""Called with a description of the current operation, the bytes done, and the total bytes (None if unknown)."""


@dataclass(frozen=True)
class Source:
    """A model that can be loaded. ``order`` sets the tensor order of a model file of version 2."""

    path: Path  # a file or a folder
    config: ModelConfig
    order: weights.Order | None = None
    uses_gpt2_tokenizer: bool = False  # use the bundled tokenizer even if the folder has tokenizer files

    def load(self, on_progress: OnProgress) -> Arena:
        """Load the sixteen tensors into one arena.

        Raises FormatError or DataError if they are damaged or are not those of a GPT-2 model.
        """
        if self.path.is_file():
            params = self._allocate()
            weights.load_weights(self.path, params, self.order)
            return params
        tensors = open_checkpoint(self.path)
        names = huggingface_weights.match(self.path, tensors, self.config)
        params = self._allocate()
        size = 4 * params.flat.size
        huggingface_weights.load(
            self.path, tensors, names, self.config, params, lambda done: on_progress("loading", 4 * done, size)
        )
        return params

    def _allocate(self) -> Arena:
        return Arena(np.zeros, parameter_shapes(self.config), np.float32)

    def tokenizer_files(self) -> list[Path]:
        """Return the paths of the tokenizer files in the model's folder."""
        if self.uses_gpt2_tokenizer or self.path.is_file():
            return []
        return [path for name in hub.TOKENIZER_FILES if (path := self.path / name).is_file()]

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer of the model's folder, or GPT-2's if the model has GPT-2's vocabulary size.

        Raises DataError if neither applies, or if the tokenizer has more tokens than the model.
        """
        names = {path.name for path in self.tokenizer_files()}
        if "vocab.json" in names and "tokenizer.json" not in names:
            raise DataError(
                f"{self.path}: found a tokenizer in vocab.json only, expected a tokenizer.json; "
                "save it with transformers' AutoTokenizer"
            )
        if "tokenizer.json" not in names and self.config.vocab_size != GPT2_VOCAB_SIZE:
            raise DataError(
                f"{self.path}: found no tokenizer for a vocabulary of {self.config.vocab_size:,}, expected a "
                "model folder with a tokenizer.json"
            )
        tokenizer = load_tokenizer(str(self.path) if "tokenizer.json" in names else "gpt2")
        if tokenizer.vocab_size > self.config.vocab_size:
            raise DataError(
                f"{tokenizer.name}: found {tokenizer.vocab_size:,} tokens, expected at most "
                f"{self.config.vocab_size:,}, the vocabulary size of the model"
            )
        return tokenizer


def open_source(name: str, order: weights.Order | None, with_tokenizer: bool, on_progress: OnProgress) -> Source:
    """Open a model file, a model folder, or a model on the hub, which is downloaded.

    ``with_tokenizer`` also downloads the tokenizer files. Only the config is read. Raises DataError or FormatError if
    the source is not a GPT-2 model, MissingError if its kind is not supported yet or the hub cannot be reached, and
    UsageError if ``order`` is given for anything but a model file of version 2.
    """
    path = Path(name)
    if order is not None and not path.is_file():
        raise UsageError(f"{name}: --order applies only to model files of version 2; omit it")
    if path.is_file():
        return _open_file(path, order)
    uses_gpt2_tokenizer = False
    if not path.is_dir():
        if not hub.REPOSITORY.fullmatch(name) or path.suffix in FILE_SUFFIXES:
            raise DataError(f"{name}: no such file or folder")
        uses_gpt2_tokenizer = OPENAI.fullmatch(name) is not None
        path = hub.fetch_model(
            name,
            with_tokenizer and not uses_gpt2_tokenizer,
            lambda file, done, total: on_progress(f"downloading {file}", done, total),
        )
    return Source(path, _read_config(path / "config.json"), uses_gpt2_tokenizer=uses_gpt2_tokenizer)


def _open_file(path: Path, order: weights.Order | None) -> Source:
    try:
        kind = identify(path)
    except MagicError as error:
        expected = "a GPT-2 model file (.bin) or a Hugging Face model folder"
        raise MagicError(path, error.found, expected, error.remedy) from None
    if kind in UNSUPPORTED_KINDS:
        raise MissingError(f"{path}: found {kind.phrase}, which is not supported yet; expected a GPT-2 model")
    if kind in (Kind.SAFETENSORS, Kind.TORCH_ZIP):
        raise DataError(
            f"{path}: found {kind.phrase}, expected a model file or folder; give the folder with its config.json"
        )
    if kind is not Kind.GPT2_MODEL:
        raise DataError(f"{path}: found {kind.phrase}, expected {Kind.GPT2_MODEL.phrase}")
    header = weights.read_header(path)
    if order is not None and header.version != 2:
        raise UsageError(f"{path}: --order applies only to model files of version 2, found version {header.version}")
    return Source(path, read_config(path), order)


def _read_config(path: Path) -> ModelConfig:
    """Read a model folder's config.json. Raises MissingError for model types that are not supported yet."""
    if not path.is_file():
        raise DataError(f"{path}: file not found, expected the config.json of a Hugging Face model folder")
    try:
        model_type = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        model_type = None  # read_config reports the error
    if model_type in UNSUPPORTED_TYPES:
        raise MissingError(f"{path}: found model_type {model_type}, which is not supported yet; expected gpt2")
    return huggingface_config.read_config(path)
