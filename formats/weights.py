"""GPT-2 models: header, and sixteen tensors, each one for all layers together."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.errors import RangeError, RefusedError, VersionError
from llmc_cli.formats.header import HEADER_BYTES, check_range, check_size, new_slots, read_slots
from llmc_cli.formats.registry import FORMATS, Kind
from llmc_cli.formats.stream import as_float32, item_bytes, map_array, read_floats, write_floats

MAGIC = FORMATS[Kind.GPT2_MODEL].magic
VERSIONS = FORMATS[Kind.GPT2_MODEL].versions

TENSORS = (
    "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
    "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb",
)  # fmt: skip
"""In the order of the file."""

NORMS = ("ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb")

NORMS_LAST = tuple(name for name in TENSORS if name not in NORMS) + NORMS
"""The order of most version 2 files: for three days in April 2024 the layernorms came last."""

Order: TypeAlias = Literal["layers", "norms last"]
"""Version 2 only: TENSORS or NORMS_LAST."""

VOCAB_MULTIPLE = 128


class GPT2Header(NamedTuple):
    """The slots of a model's header. In versions 1 and 2, whose files hold V rows of wte and no Vp,
    padded_vocab_size is V rounded up to a multiple of 128: the rows that ``load_weights`` fills."""

    magic: int
    version: int
    max_seq_len: int  # T
    vocab_size: int  # V
    num_layers: int  # L
    num_heads: int  # NH
    channels: int  # C
    padded_vocab_size: int  # Vp


class _Piece(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int  # bytes from the start of the file


def tensor_shapes(header: GPT2Header) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes as in the file: wte has V rows in versions 1 and 2, Vp in the others."""
    rows = header.padded_vocab_size if VERSIONS[header.version].padded else header.vocab_size
    return shapes(header.max_seq_len, header.num_layers, header.channels, rows)


def shapes(T: int, L: int, C: int, rows: int) -> dict[str, tuple[int, ...]]:
    """The tensors' shapes with ``rows`` rows of wte; linear weights are (out, in)."""
    return {
        "wte": (rows, C),
        "wpe": (T, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def file_size(header: GPT2Header) -> int:
    """Bytes of a model file with this header."""
    version = VERSIONS[header.version]
    return HEADER_BYTES + sum(
        math.prod(shape) * item_bytes(version.norm_dtype if name in NORMS else version.dtype)
        for name, shape in tensor_shapes(header).items()
    )


def read_header(path: str | Path) -> GPT2Header:
    """The header, after checking magic, version, ranges and the exact size of the file; nothing else is read.

    Raises MagicError, VersionError, RangeError, SizeError, and RefusedError for the files of a branch of April 2024
    that gave versions 2 and 3 other meanings (float32 and bfloat16, V rows, layernorms last, slot 7 zero).
    """
    slots = read_slots(path, Kind.GPT2_MODEL)
    header = GPT2Header(*(int(slot) for slot in slots[:8]))
    if not VERSIONS[header.version].padded:
        padded = -(-header.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        header = header._replace(padded_vocab_size=padded)
    elif header.version == 3 and header.padded_vocab_size == 0:
        raise RefusedError(
            path,
            "slot 7, the padded vocabulary, to be 0 in version 3",
            f"at least {header.vocab_size}",
            "it is of a short-lived branch of llm.c that gave this version another meaning: export the model anew",
        )
    _check_fields(path, header)
    size = Path(path).stat().st_size
    if header.version == 2 and size == file_size(header._replace(version=1)):
        raise RefusedError(
            path,
            "version 2 with the size of float32 weights and slot 7 zero",
            f"{file_size(header):,} bytes of bfloat16 weights",
            "it is of a short-lived branch of llm.c that gave version 2 another meaning: export the model anew",
        )
    check_size(path, file_size(header), f"a GPT-2 model with the shape in its header, version {header.version}")
    return header


def _check_fields(path: str | Path, header: GPT2Header) -> None:
    for name, value in zip(header._fields[2:7], header[2:7], strict=True):
        check_range(path, name, value, 1)
    check_range(path, "padded_vocab_size", header.padded_vocab_size, header.vocab_size)
    if header.channels % header.num_heads:
        raise RangeError(path, f"{header.channels} channels", f"a multiple of the {header.num_heads} heads")


def load_weights(path: str | Path, into: Mapping[str, NDArray[np.float32]], order: Order | None = None) -> GPT2Header:
    """Stream each tensor into the caller's float32 arrays, C-contiguous and of the shapes of the file.

    into["wte"] may have any number of rows from V up: those that the file lacks become 0, and padding of the file for
    which there is no row is dropped. ``order`` forces the order of a version 2 file, which is otherwise found by
    content. Raises what ``read_header`` does, and NonFiniteError naming tensor and position.
    """
    header = read_header(path)
    for name, shape in tensor_shapes(header).items():
        found = into[name].shape
        if found[1:] != shape[1:] or (found[0] != shape[0] if name != "wte" else found[0] < header.vocab_size):
            raise ValueError(f"{path}: {name} is {shape} in the file and {found} in memory")
    _stream(path, header, order, into)
    return header


def check_weights(path: str | Path, order: Order | None = None) -> GPT2Header:
    """All the checks of ``load_weights`` without keeping the weights."""
    header = read_header(path)
    _stream(path, header, order, None)
    return header


def _stream(
    path: str | Path, header: GPT2Header, order: Order | None, into: Mapping[str, NDArray[np.float32]] | None
) -> None:
    if header.version == 2 and order is None:
        order = find_order(path, header)
    with Path(path).open("rb") as file:
        file.seek(HEADER_BYTES)
        for name, piece in _pieces(header, order or "layers").items():
            if into is None:
                read_floats(file, path, name, piece.dtype, piece.shape)
                continue
            flat = as_float32(into[name], name)
            fits = min(piece.shape[0], into[name].shape[0])
            shape = (fits, *piece.shape[1:])
            read_floats(file, path, name, piece.dtype, shape, flat[: math.prod(shape)])
            if fits < piece.shape[0]:
                read_floats(file, path, f"{name} (padding)", piece.dtype, (piece.shape[0] - fits, *piece.shape[1:]))
            flat[math.prod(shape) :] = 0


def _pieces(header: GPT2Header, order: Order) -> dict[str, _Piece]:
    """The tensors in the order of the file."""
    version, stored = VERSIONS[header.version], tensor_shapes(header)
    pieces: dict[str, _Piece] = {}
    offset = HEADER_BYTES
    for name in TENSORS if order == "layers" or header.version != 2 else NORMS_LAST:
        dtype = version.norm_dtype if name in NORMS else version.dtype
        pieces[name] = _Piece(stored[name], dtype, offset)
        offset += math.prod(stored[name]) * item_bytes(dtype)
    return pieces


def find_order(path: str | Path, header: GPT2Header) -> Order:
    """Which of its two orders a version 2 file has, by content.

    Either order puts the float32 layernorms somewhere else, and what one of them takes for layernorms the other takes
    for bfloat16 weights. The lower halves of float32 numbers, read as bfloat16, are wild (huge, tiny or NaN): so the
    layernorms are where more of that is found. Where there is none anywhere, they are bfloat16 values stored as
    float32 (fresh layernorms, ones and zeros, among them): then they are where fewer lower halves are not zero.
    Raises RefusedError where that does not decide either, as in a file of zeros.
    """
    wild, ragged = zip(*(_strangeness(path, header, order) for order in ("layers", "norms last")), strict=True)
    if wild[0] != wild[1]:
        return "layers" if wild[0] > wild[1] else "norms last"
    if ragged[0] != ragged[1]:
        return "layers" if ragged[0] < ragged[1] else "norms last"
    raise RefusedError(
        path, "a version 2 file whose content fits both orders of the tensors", "one that fits one", "force an order"
    )


def _strangeness(path: str | Path, header: GPT2Header, order: Order) -> tuple[int, int]:
    """Of the lower halves of the layernorms that ``order`` sees: how many are wild as bfloat16, how many not zero."""
    wild = ragged = 0
    for name, piece in _pieces(header, order).items():
        if name in NORMS:
            halves = map_array(path, "uint16", piece.offset, 2 * math.prod(piece.shape))[::2]
            exponents = (halves >> 7) & 0xFF
            # 2^-40 to 2^16 is where weights are; an exponent of 0 is zero or a denormal, which a file of zeros has too
            wild += int(np.count_nonzero((exponents != 0) & ((exponents < 127 - 40) | (exponents > 127 + 16))))
            ragged += int(np.count_nonzero(halves))
    return wild, ragged


def save_weights(path: str | Path, header: GPT2Header, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write a model file of version 1, 3 or 5, as the header says, from float32 tensors by the names of TENSORS.

    wte is given with Vp rows in any version; version 1 takes the first V. Version 5 rounds to the nearest, ties to
    even. Raises VersionError for another version, RangeError for an impossible header.
    """
    if header.version not in VERSIONS or not VERSIONS[header.version].written:
        written = ", ".join(str(version) for version, entry in VERSIONS.items() if entry.written)
        raise VersionError(path, f"version {header.version} asked for", f"one that is written: {written}")
    _check_fields(path, header)
    version = VERSIONS[header.version]
    for name, shape in shapes(header.max_seq_len, header.num_layers, header.channels, header.padded_vocab_size).items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: {name} is {tensors[name].shape}, expected {shape}")
    slots = new_slots(Kind.GPT2_MODEL, header.version)
    slots[2:7] = header[2:7]
    slots[7] = header.padded_vocab_size if version.padded else 0
    with atomic_write(path) as file:
        file.write(slots.data)
        for name, shape in tensor_shapes(header).items():
            write_floats(file, tensors[name][: shape[0]], version.norm_dtype if name in NORMS else version.dtype)
