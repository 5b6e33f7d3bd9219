"""Where a model to convert comes from: a model file, a folder as transformers writes it, or the Hugging Face hub."""

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
"""Ids on the hub whose tokenizer is the one that ships with the program."""

LATER = (Kind.LLAMA3_MODEL, Kind.LLAMA2C_MODEL, Kind.GGUF)
LATER_TYPES = ("llama",)
FILES = (".bin", ".gguf", ".safetensors", ".pt", ".pth")  # names that are no ids on the hub

OnProgress: TypeAlias = Callable[[str, int, int | None], None]
"""Takes what is being done, how far it is, and of how much (bytes, or bytes of parameters; None: unknown)."""


@dataclass(frozen=True)
class Source:
    """A model that can be loaded. ``order`` is forced on a model file of version 2."""

    path: Path  # a file, or a folder
    config: ModelConfig
    order: weights.Order | None = None
    uses_gpt2_tokenizer: bool = False  # whatever files the folder holds

    def load(self, on_progress: OnProgress) -> Arena:
        """The sixteen tensors in one arena. FormatError or DataError where they are damaged or not a GPT-2's."""
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
        """The files of a tokenizer that the model brings along."""
        if self.uses_gpt2_tokenizer or self.path.is_file():
            return []
        return [path for name in hub.TOKENIZER_FILES if (path := self.path / name).is_file()]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model brings along, else GPT-2's where the vocabulary has its size.

        Raises DataError where neither is so, or the tokenizer has more tokens than the model.
        """
        own = {path.name for path in self.tokenizer_files()}
        if "vocab.json" in own and "tokenizer.json" not in own:
            raise DataError(
                f"{self.path}: its tokenizer is in vocab.json only, expected a tokenizer.json; "
                "save it with AutoTokenizer of transformers"
            )
        if "tokenizer.json" not in own and self.config.vocab_size != GPT2_VOCAB_SIZE:
            raise DataError(f"{self.path}: no tokenizer is known for a vocabulary of {self.config.vocab_size:,}")
        tokenizer = load_tokenizer(str(self.path) if "tokenizer.json" in own else "gpt2")
        if tokenizer.vocab_size > self.config.vocab_size:
            raise DataError(
                f"{tokenizer.name}: found {tokenizer.vocab_size:,} tokens, expected at most the "
                f"{self.config.vocab_size:,} of the model"
            )
        return tokenizer


def open_source(name: str, order: weights.Order | None, tokenizer: bool, on_progress: OnProgress) -> Source:
    """The model called ``name``: a file or folder where there is one, else an id on the hub, which is fetched, with
    ``tokenizer`` including the files of its tokenizer.

    Nothing but its config is read yet. Raises DataError or FormatError for what is no GPT-2, MissingError for what
    cannot be converted yet and where the hub cannot be reached, UsageError for an ``order`` of anything but a model
    file of version 2.
    """
    path = Path(name)
    if order is not None and not path.is_file():
        raise UsageError(f"{name}: --order is for a model file of version 2")
    if path.is_file():
        return _open_file(path, order)
    uses_gpt2_tokenizer = False
    if not path.is_dir():
        if not hub.REPOSITORY.fullmatch(name) or path.suffix in FILES:
            raise DataError(f"{name}: no such file or folder")
        uses_gpt2_tokenizer = OPENAI.fullmatch(name) is not None
        path = hub.fetch_model(
            name,
            tokenizer and not uses_gpt2_tokenizer,
            lambda file, done, total: on_progress(f"fetching {file}", done, total),
        )
    return Source(path, _read_config(path / "config.json"), uses_gpt2_tokenizer=uses_gpt2_tokenizer)


def _open_file(path: Path, order: weights.Order | None) -> Source:
    kind = identify(path)
    if kind in LATER:
        raise MissingError(f"{path}: a {kind.value}: not yet; only GPT-2 can be converted")
    if kind in (Kind.SAFETENSORS, Kind.TORCH_ZIP):
        raise DataError(f"{path}: found a {kind.value}; give the folder that it lies in, with its config.json")
    if kind is not Kind.GPT2_MODEL:
        raise DataError(f"{path}: found a {kind.value}, expected a {Kind.GPT2_MODEL.value}")
    header = weights.read_header(path)
    if order is not None and header.version != 2:
        raise UsageError(
            f"{path}: --order is for version 2, which exists in two orders; found version {header.version}"
        )
    return Source(path, read_config(path), order)


def _read_config(path: Path) -> ModelConfig:
    """The shape that a folder's config.json gives; MissingError for the families that come later."""
    if not path.is_file():
        raise DataError(f"{path}: not there; a folder as transformers writes it has one")
    try:
        family = json.loads(path.read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        family = None  # the reader below says what is wrong
    if family in LATER_TYPES:
        raise MissingError(f"{path}: a model of type {family}: not yet; only GPT-2 can be converted")
    return huggingface_config.read_config(path)
