"""Write model files and folders."""

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmc_cli.conversion.sources import Source
from llmc_cli.conversion.targets import STORED, VERSIONS, Dtype
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
class Written:
    """A file that was written, and what is in it."""

    path: Path
    content: str
    bytes: int


def write_model(path: Path, config: ModelConfig, params: Arena, version: int) -> Written:
    """A model file."""
    header = weights.GPT2Header(
        weights.MAGIC, version, config.max_seq_len, config.vocab_size,
        config.num_layers, config.num_heads, config.channels, config.padded_vocab_size,
    )  # fmt: skip
    weights.save_weights(path, header, params)
    dtype = next(dtype for dtype, versions in VERSIONS.items() if version in versions)
    count = sum(math.prod(shape) for shape in weights.tensor_shapes(header).values())
    return _written(path, f"{count:,} parameters ({dtype}, version {version})")


def write_folder(folder: Path, source: Source, params: Arena, dtype: Dtype) -> list[Written]:
    """A folder that transformers loads as it is: config, weights, and the tokenizer where one is known.

    It is made beside its place and takes it when it is complete; an older one goes then.
    """
    tensors = huggingface_weights.export(source.config, params)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        made = beside / "new"
        write_safetensors(made / "model.safetensors", tensors, STORED[dtype])
        for name, content in small_files(source, dtype).items():
            with atomic_write(made / name) as file:
                file.write(content)
        old = beside / "old"
        try:
            if folder.exists():
                folder.rename(old)
            made.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(beside)
    contents = {
        "config.json": "the shape of the model",
        "model.safetensors": f"{sum(each.size for each in tensors.values()):,} parameters ({dtype})",
    }
    return [_written(path, contents.get(path.name, "the tokenizer")) for path in sorted(folder.iterdir())]


def small_files(source: Source, dtype: Dtype) -> dict[str, bytes]:
    """What a folder holds beside the weights, by name."""
    config = source.config
    values = {**huggingface_config.config_to_dict(config), "torch_dtype": STORED[dtype]}
    files = {"config.json": json.dumps(values, indent=2).encode() + b"\n"}
    if own := source.tokenizer_files():
        files |= {path.name: path.read_bytes() for path in own}
    elif config.vocab_size == GPT2_VOCAB_SIZE:
        files |= gpt2_files(load_tokenizer("gpt2"), config.max_seq_len)
    return files


def _written(path: Path, content: str) -> Written:
    return Written(path, content, path.stat().st_size)
