"""Writing model files and Hugging Face model folders."""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmc_cli.conversion.sources import Source
from llmc_cli.conversion.targets import DTYPE_NAMES, VERSIONS, Dtype
from llmc_cli.formats import weights
from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.safetensors import write_safetensors
from llmc_cli.models import huggingface_config, huggingface_weights
from llmc_cli.models.arena import Arena
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.presets import GPT2_VOCAB_SIZE
from llmc_cli.tokenizer.huggingface import gpt2_files
from llmc_cli.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True)
class WrittenFile:
    """A file written by a conversion, with a description of its content."""

    path: Path
    content: str
    bytes: int


def written_file(path: Path, content: str) -> WrittenFile:
    return WrittenFile(path, content, path.stat().st_size)


def write_model(path: Path, config: ModelConfig, params: Arena, version: int) -> WrittenFile:
    """Write a model file."""
    header = weights.GPT2Header(
        weights.MAGIC, version, config.max_seq_len, config.vocab_size,
        config.num_layers, config.num_heads, config.channels, config.padded_vocab_size,
    )  # fmt: skip
    weights.save_weights(path, header, params)
    dtype = next(dtype for dtype, versions in VERSIONS.items() if version in versions)
    count = sum(math.prod(shape) for shape in weights.tensor_shapes(header).values())
    return written_file(path, f"{count:,} parameters ({dtype}, version {version})")


def write_folder(folder: Path, source: Source, params: Arena, dtype: Dtype) -> list[WrittenFile]:
    """Write a folder that transformers can load: config, weights, and the tokenizer if it is available.

    The files are written to a temporary folder in the same parent folder, which is renamed when it is complete. An
    existing folder is replaced.
    """
    tensors = huggingface_weights.export(source.config, params)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        new, old = temporary / "new", temporary / "old"
        write_safetensors(new / "model.safetensors", tensors, DTYPE_NAMES[dtype])
        for name, content in config_and_tokenizer_files(source, dtype).items():
            with atomic_write(new / name) as file:
                file.write(content)
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(temporary)
    contents = {
        "config.json": "the model configuration",
        "model.safetensors": f"{sum(each.size for each in tensors.values()):,} parameters ({dtype})",
    }
    return [written_file(path, contents.get(path.name, "the tokenizer")) for path in sorted(folder.iterdir())]


def config_and_tokenizer_files(source: Source, dtype: Dtype) -> dict[str, bytes]:
    """Return the contents of all files of a model folder except the weights, by name."""
    config = source.config
    values = {**huggingface_config.config_to_dict(config), "torch_dtype": DTYPE_NAMES[dtype]}
    files = {"config.json": json.dumps(values, indent=2).encode() + b"\n"}
    if paths := source.tokenizer_files():
        files |= {path.name: path.read_bytes() for path in paths}
    elif config.vocab_size == GPT2_VOCAB_SIZE:
        files |= gpt2_files(load_tokenizer("gpt2"), config.max_seq_len)
    return files
