"""Targets of a conversion: the files and folders it writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from llmc_cli.conversion.debug_state import Reference
from llmc_cli.downloads import hub
from llmc_cli.errors import UsageError
from llmc_cli.formats import weights

Dtype: TypeAlias = Literal["fp32", "bf16"]


VERSIONS: dict[Dtype, tuple[int, ...]] = {"fp32": (3, 1), "bf16": (5,)}
"""The versions of a model file by dtype, the default first."""

DTYPE_NAMES: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}

GPT2_IDS = ("gpt2", "openai-community/gpt2")
"""Model ids that can be converted without a destination; their output files have fixed names."""

FOLDER_FILES = {"config.json", "model.safetensors", *hub.TOKENIZER_FILES}
"""The possible files of a model folder. An existing folder is replaced only if it contains no other files."""

UNSUPPORTED_SUFFIXES = (".gguf", ".safetensors", ".pt", ".pth")


@dataclass(frozen=True)
class Request:
    """The arguments of a conversion. ``dest`` is a name that ends in .bin, a folder, or None (see ``choose_targets``).

    ``batch`` (default 4), ``seq_len`` (default 64 or the model's maximum), ``data`` (default: Tiny Shakespeare's
    validation shard, or the bundled text) and ``reference`` (default: PyTorch if installed) apply to the debug state.
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
    """The outputs of a conversion: model files with their versions, a folder, a debug state and a tokenizer table."""

    models: tuple[tuple[Path, int], ...] = ()
    folder: Path | None = None
    debug_state: Path | None = None
    tokenizer: Path | None = None

    @property
    def paths(self) -> list[Path]:
        optional = (path for path in (self.folder, self.debug_state, self.tokenizer) if path is not None)
        return [*(path for path, _ in self.models), *optional]


def choose_targets(request: Request) -> Targets:
    """Return the outputs of a request. Raises UsageError if its options conflict or it has no output.

    Without a destination, these are the debug state and the tokenizer table if requested, and for the model ids in
    GPT2_IDS otherwise the four files that llm.c's programs read.
    """
    dest, dtype, version = request.dest, request.dtype, request.version
    extras = Targets(debug_state=request.debug_state, tokenizer=request.tokenizer)
    if dest is None:
        if dtype is not None or version is not None:
            raise UsageError("--dtype and --version need a DEST, which is missing; give a DEST")
        if extras.paths:
            return extras
        if request.source not in GPT2_IDS:
            raise UsageError("nothing to write: give a DEST (X.bin or a folder), --debug-state or --tokenizer")
        return Targets(
            models=((Path("gpt2_124M.bin"), 3), (Path("gpt2_124M_bf16.bin"), 5)),
            debug_state=Path("gpt2_124M_debug_state.bin"),
            tokenizer=Path("gpt2_tokenizer.bin"),
        )
    if dest.suffix == ".bin":
        return Targets(((dest, choose_version(dtype, version)),), None, extras.debug_state, extras.tokenizer)
    if dest.suffix in UNSUPPORTED_SUFFIXES or (dest.exists() and not dest.is_dir()):
        raise UsageError(f"{dest}: expected a file name that ends in .bin, or a folder")
    if dest.name in ("", ".."):
        raise UsageError(f"{dest}: expected the name of a folder, which is created or replaced")
    if version is not None:
        raise UsageError(f"{dest}: --version {version} applies to .bin files, but DEST is a folder; use --dtype")
    return Targets((), dest, extras.debug_state, extras.tokenizer)


def choose_version(dtype: Dtype | None, version: int | None) -> int:
    """Return the version of a model file. Raises UsageError if it cannot be written or has another dtype."""
    if version is None:
        return VERSIONS[dtype or "fp32"][0]
    version_dtype = next((each for each, versions in VERSIONS.items() if version in versions), None)
    if version_dtype is None:
        raise UsageError(f"--version {version} cannot be written; expected 1 or 3 (fp32) or 5 (bf16)")
    if dtype not in (None, version_dtype):
        raise UsageError(f"--version {version} is {version_dtype}, but --dtype is {dtype}; give only one of them")
    return version


def check_paths(request: Request, targets: Targets) -> None:
    """Check the paths of the outputs.

    Raises UsageError if an output is also an input, occurs twice, is an existing folder although a file is expected,
    or is a folder that contains files other than FOLDER_FILES.
    """
    if "-" in (request.source, *map(str, targets.paths)):
        raise UsageError("-: convert does not read stdin or write stdout; give file names")
    sources = [Path(name).resolve() for name in (request.source, request.data) if name is not None]
    seen: set[Path] = set()
    for path in targets.paths:
        resolved = path.resolve()
        if resolved in sources or (resolved.parent in sources and resolved.exists()):
            raise UsageError(f"{path}: the output would overwrite an input; give another name")
        if resolved in seen:
            raise UsageError(f"{path}: the same name is given for two outputs; give different names")
        seen.add(resolved)
        if path != targets.folder and path.is_dir():
            raise UsageError(f"{path}: found a folder, expected the name of a file")
    folder = targets.folder
    if folder and folder.is_dir():
        other_files = sorted(entry.name for entry in folder.iterdir() if entry.name not in FOLDER_FILES)
        if other_files:
            raise UsageError(f"{folder}: the folder contains other files ({other_files[0]}); give a new folder")
