"""Model files: read a model's shape, load a model, save one."""

from pathlib import Path

from llmc_cli.formats import weights
from llmc_cli.kernels.spec import Kernels
from llmc_cli.models import huggingface_config
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.presets import preset


def read_config(path: Path) -> ModelConfig:
    """The shape of a model file. FormatError where it is none."""
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
    """The model in a file, in the backend's own precision. FormatError where the file is damaged."""
    model = GPT2(read_config(Path(path)), kernels)
    with model.fill() as params:
        weights.load_weights(path, params)
    return model


def save_model(path: str | Path, model: GPT2, version: int = 3) -> None:
    """Write the model file (version 1 or 3: float32, 5: bfloat16), whole or not at all."""
    c = model.config
    header = weights.GPT2Header(
        weights.MAGIC, version, c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels, c.padded_vocab_size
    )
    weights.save_weights(path, header, model.host_params())


def model_config(name: str) -> ModelConfig:
    """The shape that ``--model`` names: a model file, a Hugging Face config file, or a preset."""
    path = Path(name)
    if path.suffix == ".json" and path.exists():
        return huggingface_config.read_config(path)
    return read_config(path) if path.is_file() else preset(name)
