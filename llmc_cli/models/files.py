"""Read and write models in llm.c's file format."""

from pathlib import Path

from llmc_cli.formats import weights
from llmc_cli.kernels.spec import Kernels
from llmc_cli.models import huggingface_config
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.presets import get_preset


def read_config(path: Path) -> ModelConfig:
    """Return the shape of a model file. Raises FormatError if it is not a valid one."""
    header = weights.read_header(path)
    return ModelConfig(
        header.max_seq_len,
        header.vocab_size,
        header.num_layers,
        header.num_heads,
        header.channels,
        header.padded_vocab_size,
    )


def load_model(path: str | Path, kernels: Kernels) -> GPT2:
    """Load a model file into the backend's parameter dtype. Raises FormatError if the file is damaged."""
    model = GPT2(read_config(Path(path)), kernels)
    with model.overwrite_params() as params:
        weights.load_weights(path, params)
    return model


def save_model(path: str | Path, model: GPT2, version: int = 3) -> None:
    """Write a model file atomically. Versions 1 and 3 store float32, version 5 bfloat16."""
    c = model.config
    header = weights.GPT2Header(
        weights.MAGIC, version, c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels, c.padded_vocab_size
    )
    weights.save_weights(path, header, model.host_params())


def resolve_config(name: str) -> ModelConfig:
    """Return the shape named by ``--model``: a model file, a Hugging Face config file (.json), or a preset."""
    path = Path(name)
    if path.suffix == ".json" and path.exists():
        return huggingface_config.read_config(path)
    return read_config(path) if path.is_file() else get_preset(name)
