"""The table of file formats (magic numbers, versions, element types), and the identification of files."""

import zipfile
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from llmc_cli.formats.errors import MagicError, RefusedError


class Kind(Enum):
    """The kind of a file. The value is its name in messages."""

    HEADERLESS = "headerless token file"
    SHARD_GPT2 = "GPT-2 token shard"
    SHARD_LLAMA3 = "Llama 3 token shard"
    EVALSET = "evaluation set"
    VOCABULARY = "tokenizer table"
    GPT2_MODEL = "GPT-2 model"
    GPT2_DEBUG_STATE = "GPT-2 debug state"
    TRAIN_STATE = "training state"
    LLAMA3_MODEL = "Llama 3 model"
    LLAMA2C_MODEL = "llama2.c model"
    GGUF = "GGUF file"
    SAFETENSORS = "safetensors file"
    TORCH_ZIP = "PyTorch checkpoint"

    @property
    def phrase(self) -> str:
        """The name with its indefinite article."""
        return f"{'an' if self is Kind.EVALSET else 'a'} {self.value}"


class Version(NamedTuple):
    """One version of a format."""

    dtype: str  # of the elements after the header; in models, of all tensors except the layernorms
    norm_dtype: str = ""  # models only: of the layernorm weights and biases
    padded: bool = False  # models and debug states: wte has Vp rows, not V
    written: bool = True  # whether this package writes it


class Format(NamedTuple):
    """A file format that begins with a 32-bit little-endian magic number."""

    magic: int
    versions: dict[int, Version]
    readable: bool = True


FORMATS = {
    Kind.SHARD_GPT2: Format(20240520, {1: Version("uint16")}),
    Kind.SHARD_LLAMA3: Format(20240801, {7: Version("uint32")}),
    Kind.EVALSET: Format(20240522, {1: Version("uint16", written=False)}),
    Kind.VOCABULARY: Format(20240328, {1: Version("uint8"), 2: Version("uint8")}),
    Kind.GPT2_MODEL: Format(
        20240326,
        {
            1: Version("float32", "float32"),
            2: Version("bfloat16", "float32", written=False),
            3: Version("float32", "float32", padded=True),
            4: Version("bfloat16", "float32", padded=True, written=False),
            5: Version("bfloat16", "bfloat16", padded=True),
        },
    ),
    Kind.GPT2_DEBUG_STATE: Format(20240327, {1: Version("float32", written=False), 2: Version("float32", padded=True)}),
    Kind.TRAIN_STATE: Format(20240527, {1: Version("float32")}),
    Kind.LLAMA3_MODEL: Format(20240803, {3: Version("float32"), 5: Version("bfloat16")}, readable=False),
    Kind.LLAMA2C_MODEL: Format(0x616B3432, {1: Version("float32"), 2: Version("int8")}, readable=False),
    Kind.GGUF: Format(int.from_bytes(b"GGUF", "little"), {}, readable=False),
}

KIND_OF_MAGIC = {entry.magic: kind for kind, entry in FORMATS.items()}

TORCH_LEGACY = bytes.fromhex("80028a0a6cfc9c46f920")
"""The first bytes of a file saved before PyTorch 1.6: a pickle of PyTorch's magic number."""

HEADERLESS_TOKEN_BYTES = 4

BIG_ENDIAN_REMEDY = "its bytes are in reverse order: write it again on a little-endian machine"


def identify(path: str | Path) -> Kind:
    """Return the kind of a file from its first bytes. The header and the size are not checked.

    Raises MagicError for an unknown kind. Headerless token files are never identified, since any file could be one.
    """
    path = Path(path)
    with path.open("rb") as file:
        start = file.read(32)
    if len(start) >= 4 and (kind := KIND_OF_MAGIC.get(int.from_bytes(start[:4], "little"))):
        return kind
    if start.startswith(b"PK") and _is_torch_zip(path):
        return Kind.TORCH_ZIP
    if start.startswith(TORCH_LEGACY):
        raise RefusedError(
            path,
            "a bare pickle, the format of PyTorch before version 1.6",
            "PyTorch's zip format",
            "load it and save it again with a newer version of PyTorch",
        )
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
        return Kind.SAFETENSORS
    raise MagicError(path, describe_start(start), "a supported file format", _unknown_remedy(path, start))


def describe_start(start: bytes) -> str:
    """Describe the first bytes of a file for an error message."""
    if len(start) < 4:
        return f"a file size of {len(start)} bytes"
    magic = int.from_bytes(start[:4], "little")
    return describe_kind(KIND_OF_MAGIC.get(magic), magic)


def describe_kind(kind: Kind | None, magic: int) -> str:
    return f"{kind.phrase if kind else 'an unknown file format'} (magic number {magic})"


def check_readable(path: str | Path, kind: Kind) -> None:
    """Raise RefusedError if ``kind`` has no reader."""
    if kind in FORMATS and not FORMATS[kind].readable:
        raise RefusedError(path, kind.phrase, "a supported file format", "this format is not supported yet")


def _unknown_remedy(path: Path, start: bytes) -> str:
    if len(start) < 4:
        return "the file is empty or truncated"
    if int.from_bytes(start[:4], "big") in KIND_OF_MAGIC:
        return BIG_ENDIAN_REMEDY
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if path.suffix == ".bin" and path.stat().st_size % HEADERLESS_TOKEN_BYTES == 0:
        return "a headerless token file cannot be identified; write the tokens as shards (llmc prepro --format shard)"
    return ""


def _is_torch_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
