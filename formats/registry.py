"""Every file kind in one table: its magic, its versions and what their elements are; and which kind a file is."""

import zipfile
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from llmc_cli.formats.errors import MagicError, RefusedError


class Kind(Enum):
    """What a file is; the value is its name in messages."""

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


class Version(NamedTuple):
    """One version of a format."""

    dtype: str  # of the body's elements; of everything but the layernorms in a model
    norm_dtype: str = ""  # models only: of the layernorms' weights and biases
    padded: bool = False  # models and debug states: wte has Vp rows, not V
    written: bool = True


class Format(NamedTuple):
    """One kind of file that begins with a magic number (32 bits, little-endian)."""

    magic: int
    versions: dict[int, Version]
    readable: bool = True


FORMATS = {
    Kind.SHARD_GPT2: Format(20240520, {1: Version("uint16")}),
    Kind.SHARD_LLAMA3: Format(20240801, {7: Version("uint32")}),
    Kind.EVALSET: Format(20240522, {1: Version("uint16")}),
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
"""How a PyTorch file of before version 1.6 begins: a bare pickle of PyTorch's magic number."""


def identify(path: str | Path) -> Kind:
    """The kind of the file at ``path`` by its first bytes; its header and size are the reader's to check.

    Raises MagicError for what is of no known kind, headerless token files among them: any file could be one.
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
            "a PyTorch file in the format of before 1.6, a bare pickle",
            "PyTorch's zip format",
            "load and save it with a newer PyTorch",
        )
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size - 8:
        return Kind.SAFETENSORS
    raise MagicError(path, describe_start(start), "a file of a known kind", _unknown_remedy(start))


def describe_start(start: bytes) -> str:
    """What a file's first bytes are, for messages."""
    if len(start) < 4:
        return f"a file of {len(start)} bytes"
    magic = int.from_bytes(start[:4], "little")
    known = KIND_OF_MAGIC.get(magic)
    return f"magic {magic} ({known.value if known else 'unknown'})"


def check_readable(path: str | Path, kind: Kind) -> None:
    """Raise RefusedError where ``kind`` is known by name but has no reader."""
    if kind in FORMATS and not FORMATS[kind].readable:
        raise RefusedError(path, f"a {kind.value}", "a kind that can be read", f"{kind.value}: not yet readable")


def _unknown_remedy(start: bytes) -> str:
    if int.from_bytes(start[:4], "big") in KIND_OF_MAGIC:
        return "its bytes are in reverse order: it was written on a big-endian machine"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: fetch the file itself (git lfs pull)"
    return "a headerless token file has no magic and is never guessed: name it as such where a command offers to"


def _is_torch_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False
