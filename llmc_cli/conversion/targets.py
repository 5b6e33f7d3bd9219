"""What a conversion writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from llmc_cli.conversion.debug_state import Reference
from llmc_cli.downloads import hub
from llmc_cli.errors import UsageError
from llmc_cli.formats import weights

Dtype: TypeAlias = Literal["fp32", "bf16"]


VERSIONS: dict[Dtype, tuple[int, ...]] = {"fp32": (3, 1), "bf16": (5,)}
"""Of a model file, the usual one first."""


STORED: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}


GPT2 = ("gpt2", "openai-community/gpt2")
"""Ids that have files of their own when none are asked for."""


FOLDER_FILES = {"config.json", "model.safetensors", *hub.TOKENIZER_FILES}
"""What a folder is made of; one that holds nothing else may be replaced."""

NOT_WRITTEN = (".gguf", ".safetensors", ".pt", ".pth")


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
