"""Models from one form into another, and what belongs to a model: a debug state, a tokenizer table.

What is asked for is checked first, then the source is loaded once, into one arena of float32, and everything is written
from there.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from llmc_cli.conversion import debug_state
from llmc_cli.conversion.debug_state import Reference
from llmc_cli.conversion.sources import OnProgress, Source, open_source
from llmc_cli.downloads import hub
from llmc_cli.errors import UsageError
from llmc_cli.formats import weights
from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.debug_state import write_debug_state
from llmc_cli.formats.safetensors import write_safetensors
from llmc_cli.models import huggingface_config, huggingface_weights
from llmc_cli.models.arena import Arena
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.presets import GPT2_VOCAB_SIZE
from llmc_cli.tokenizer.huggingface import gpt2_files
from llmc_cli.tokenizer.tokenizer import load_tokenizer, write_tokenizer_table

Dtype: TypeAlias = Literal["fp32", "bf16"]

VERSIONS: dict[Dtype, tuple[int, ...]] = {"fp32": (3, 1), "bf16": (5,)}
"""Of a model file, the usual one first."""

STORED: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}

GPT2 = ("gpt2", "openai-community/gpt2")
"""Ids that have files of their own when none are asked for."""

NOT_WRITTEN = (".gguf", ".safetensors", ".pt", ".pth")

FOLDER_FILES = {"config.json", "model.safetensors", *hub.TOKENIZER_FILES}
"""What a folder is made of; one that holds nothing else may be replaced."""

BATCH, SEQ_LEN = 4, 64  # of a debug state, where the model allows it


@dataclass(frozen=True)
class Request:
    """What is asked for. ``dest`` is a file that ends in .bin or a folder; None: see ``choose_targets``.

    ``batch`` (None: 4), ``seq_len`` (None: 64, or what the model allows), ``data`` (None: the usual shard, or the
    bundled text) and ``reference`` (None: PyTorch where it is installed) are of the debug state.
    """

    source: str
    dest: Path | None = None
    dtype: Dtype | None = None
    version: int | None = None
    order: weights.Order | None = None
    debug_state: Path | None = None
    batch: int | None = None
    seq_len: int | None = None
    data: Path | None = None
    reference: Reference | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Targets:
    """What is to be written: model files with their versions, a folder, and what goes with a model."""

    models: tuple[tuple[Path, int], ...] = ()
    folder: Path | None = None
    debug_state: Path | None = None
    tokenizer: Path | None = None

    @property
    def paths(self) -> list[Path]:
        others = (path for path in (self.folder, self.debug_state, self.tokenizer) if path is not None)
        return [*(path for path, _ in self.models), *others]


@dataclass(frozen=True)
class Written:
    """A file that was written, and what is in it."""

    path: Path
    content: str
    bytes: int


@dataclass(frozen=True)
class Conversion:
    """A source and what it becomes, checked as far as that goes without loading it."""

    request: Request
    targets: Targets
    source: Source
    batch: debug_state.Batch | None
    reference: Reference | None

    def run(self, on_progress: OnProgress) -> Iterator[Written]:
        """Load, and write one file after the other."""
        targets, config = self.targets, self.source.config
        if targets.models or targets.folder or self.batch:
            params = self.source.load(on_progress)
            for path, version in targets.models:
                on_progress(f"writing {path}", 0, None)
                yield write_model(path, config, params, version)
            if targets.folder:
                on_progress(f"writing {targets.folder}", 0, None)
                yield from write_folder(targets.folder, self.source, params, self.request.dtype or "fp32")
            if targets.debug_state and self.batch and self.reference:
                on_progress(f"computing by {self.reference}", 0, None)
                values = debug_state.compute(self.reference, config, params, self.batch)
                write_debug_state(targets.debug_state, *self.batch, values.logits, values.loss, values.grads)
                size = self.batch.inputs.size
                yield _written(targets.debug_state, f"the logits, loss and gradients of {size:,} tokens")
        if targets.tokenizer:
            tokenizer = self.source.tokenizer()
            write_tokenizer_table(targets.tokenizer, tokenizer)
            yield _written(targets.tokenizer, f"{tokenizer.vocab_size:,} tokens")


def plan(
    request: Request,
    on_progress: OnProgress = lambda what, done, total: None,
    on_shortfall: Callable[[str], None] = lambda why: None,
) -> Conversion:
    """Check ``request`` and open its source, fetching it where it is on the hub; nothing is written yet.

    ``on_shortfall`` is told where the debug state's batch comes from the bundled text. Raises UsageError, DataError,
    FormatError and MissingError.
    """
    targets = choose_targets(request)
    check_paths(request, targets)
    for name in ("batch", "seq_len", "data", "reference"):
        if getattr(request, name) is not None and not targets.debug_state:
            raise UsageError(f"--{name.replace('_', '-')} is of a debug state; ask for one by --debug-state FILE")
    reference = debug_state.choose_reference(request.reference) if targets.debug_state else None
    brings_tokenizer = targets.folder is not None or targets.tokenizer is not None
    source = open_source(request.source, request.order, brings_tokenizer, on_progress)
    batch = None
    if targets.debug_state:
        longest = source.config.max_seq_len
        seq_len = min(SEQ_LEN, longest) if request.seq_len is None else request.seq_len
        if seq_len > longest:
            raise UsageError(f"--seq-len {seq_len}: the model has {longest} positions")
        batch = debug_state.take_batch(request.data, source.config, request.batch or BATCH, seq_len, on_shortfall)
    if targets.tokenizer:
        source.tokenizer()  # what is wrong with it is said before anything is written
    return Conversion(request, targets, source, batch, reference)


def choose_targets(request: Request) -> Targets:
    """What is to be written. UsageError where the request contradicts itself, or asks for nothing.

    Without a destination it is what else is asked for, or, for GPT-2 alone, the four files that llm.c's programs read.
    """
    dest, dtype, version = request.dest, request.dtype, request.version
    others = Targets(debug_state=request.debug_state, tokenizer=request.tokenizer)
    if dest is None:
        if dtype is not None or version is not None:
            raise UsageError("--dtype and --version say how DEST is to be written; give a DEST")
        if others.paths:
            return others
        if request.source not in GPT2:
            raise UsageError("give a DEST, X.bin or a folder, or ask for --debug-state or --tokenizer")
        return Targets(
            models=((Path("gpt2_124M.bin"), 3), (Path("gpt2_124M_bf16.bin"), 5)),
            debug_state=Path("gpt2_124M_debug_state.bin"),
            tokenizer=Path("gpt2_tokenizer.bin"),
        )
    if dest.suffix == ".bin":
        return Targets(((dest, choose_version(dtype, version)),), None, others.debug_state, others.tokenizer)
    if dest.suffix in NOT_WRITTEN or (dest.exists() and not dest.is_dir()):
        raise UsageError(f"{dest}: expected a name that ends in .bin, or a folder")
    if dest.name in ("", ".."):
        raise UsageError(f"{dest}: expected the name of a folder, which is made anew")
    if version is not None:
        raise UsageError(f"{dest}: --version {version} is for a .bin, and this is a folder; use --dtype")
    return Targets((), dest, others.debug_state, others.tokenizer)


def choose_version(dtype: Dtype | None, version: int | None) -> int:
    """The version of a model file. UsageError where it is not written, or not of this dtype."""
    if version is None:
        return VERSIONS[dtype or "fp32"][0]
    holds = next((each for each, versions in VERSIONS.items() if version in versions), None)
    if holds is None:
        raise UsageError(f"--version {version} is not written; there are 3 and 1 (fp32) and 5 (bf16)")
    if dtype not in (None, holds):
        raise UsageError(f"--version {version} holds {holds}, and --dtype asks for {dtype}; give one of them")
    return version


def check_paths(request: Request, targets: Targets) -> None:
    """Raise UsageError where a target is a source, another target, a folder in the place of a file, or a folder with
    files that are not ours to replace."""
    if "-" in (request.source, *map(str, targets.paths)):
        raise UsageError("-: convert reads and writes files only; give names")
    sources = [Path(name).resolve() for name in (request.source, request.data) if name is not None]
    seen: set[Path] = set()
    for path in targets.paths:
        place = path.resolve()
        if place in sources or (place.parent in sources and place.exists()):
            raise UsageError(f"{path}: this is what is read; give another name to what is written")
        if place in seen:
            raise UsageError(f"{path}: asked for twice")
        seen.add(place)
        if path != targets.folder and path.is_dir():
            raise UsageError(f"{path}: this is a folder; expected the name of a file")
    folder = targets.folder
    if folder and folder.is_dir():
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in FOLDER_FILES)
        if foreign:
            raise UsageError(f"{folder}: holds other files ({foreign[0]}); give a new folder")


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
    values = {**huggingface_config.config_values(config), "torch_dtype": STORED[dtype]}
    files = {"config.json": json.dumps(values, indent=2).encode() + b"\n"}
    if own := source.tokenizer_files():
        files |= {path.name: path.read_bytes() for path in own}
    elif config.vocab_size == GPT2_VOCAB_SIZE:
        files |= gpt2_files(load_tokenizer("gpt2"), config.max_seq_len)
    return files


def _written(path: Path, content: str) -> Written:
    return Written(path, content, path.stat().st_size)
