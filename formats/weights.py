"""GPT-2 model files: a header and sixteen tensors; those of the layers are stacked over all layers."""

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
from llmc_cli.formats.stream import flat_view, item_bytes, map_array, read_floats, write_floats

MAGIC = FORMATS[Kind.GPT2_MODEL].magic
VERSIONS = FORMATS[Kind.GPT2_MODEL].versions

TENSORS = (
    "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
    "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb",
)  # fmt: skip
"""The tensors in the order of the file."""

NORMS = ("ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb")

NORMS_LAST = tuple(name for name in TENSORS if name not in NORMS) + NORMS
"""The order of most version 2 files: for three days in April 2024, llm.c wrote the layernorms last."""

Order: TypeAlias = Literal["layers", "norms last"]
"""The order of the tensors, TENSORS or NORMS_LAST. Only version 2 files exist in both."""

VOCAB_MULTIPLE = 128

OLD_BRANCH_REMEDY = "the file was written by a short-lived branch of llm.c with another layout: export the model again"


class GPT2Header(NamedTuple):
    """The header of a model file.

    Files of versions 1 and 2 have V rows of wte and do not store Vp. For these, padded_vocab_size is V rounded up to a
    multiple of 128.
    """

    magic: int
    version: int
    max_seq_len: int  # T
    vocab_size: int  # V
    num_layers: int  # L
    num_heads: int  # NH
    channels: int  # C
    padded_vocab_size: int  # Vp


class _StoredTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    offset: int  # in bytes, from the start of the file


def tensor_shapes(header: GPT2Header) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the file: wte has V rows in versions 1 and 2, Vp rows in later versions."""
    rows = header.padded_vocab_size if VERSIONS[header.version].padded else header.vocab_size
    return _shapes(header.max_seq_len, header.num_layers, header.channels, rows)


def _shapes(T: int, L: int, C: int, rows: int) -> dict[str, tuple[int, ...]]:
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
    """Return the size in bytes of a model file with this header."""
    version = VERSIONS[header.version]
    return HEADER_BYTES + sum(
        math.prod(shape) * item_bytes(version.norm_dtype if name in NORMS else version.dtype)
        for name, shape in tensor_shapes(header).items()
    )


def read_header(path: str | Path) -> GPT2Header:
    """Read the header, and check its magic number, version and ranges and the exact file size.

    Raises MagicError, VersionError, RangeError, SizeError, and RefusedError for files of an llm.c branch of April 2024
    that used versions 2 and 3 for other layouts (float32 and bfloat16, V rows of wte, layernorms last, slot 7 zero).
    """
    slots = read_slots(path, Kind.GPT2_MODEL)
    header = GPT2Header(*(int(slot) for slot in slots[:8]))
    if not VERSIONS[header.version].padded:
        padded = -(-header.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        header = header._replace(padded_vocab_size=padded)
    elif header.version == 3 and header.padded_vocab_size == 0:
        raise RefusedError(
            path,
            "padded_vocab_size = 0 (slot 7) in a version 3 header",
            f"at least {header.vocab_size}",
            OLD_BRANCH_REMEDY,
        )
    _check_fields(path, header)
    size = Path(path).stat().st_size
    if header.version == 2 and size == file_size(header._replace(version=1)):
        raise RefusedError(
            path,
            f"a version 2 header and a file size of {size:,} bytes, which is that of float32 weights",
            f"{file_size(header):,} bytes for bfloat16 weights",
            OLD_BRANCH_REMEDY,
        )
    check_size(path, file_size(header), f"a version {header.version} GPT-2 model with the shape in its header")
    return header


def _check_fields(path: str | Path, header: GPT2Header) -> None:
    for name, value in zip(header._fields[2:7], header[2:7], strict=True):
        check_range(path, name, value, 1)
    check_range(path, "padded_vocab_size", header.padded_vocab_size, header.vocab_size)
    if header.channels % header.num_heads:
        raise RangeError(path, f"channels = {header.channels}", f"a multiple of num_heads = {header.num_heads}")


def load_weights(path: str | Path, into: Mapping[str, NDArray[np.float32]], order: Order | None = None) -> GPT2Header:
    """Read each tensor into the caller's C-contiguous float32 arrays, which must have the shapes of the file.

    into["wte"] may have V rows or more: rows missing in the file are set to 0, and padding rows of the file that do
    not fit are dropped. ``order`` sets the tensor order of a version 2 file; by default it is detected. Raises the
    errors of ``read_header``, and NonFiniteError with the tensor and the index.
    """
    header = read_header(path)
    for name, shape in tensor_shapes(header).items():
        found = into[name].shape
        if found[1:] != shape[1:] or (found[0] != shape[0] if name != "wte" else found[0] < header.vocab_size):
            raise ValueError(f"{path}: {name} has shape {shape} in the file and {found} in memory")
    _read_tensors(path, header, order, into)
    return header


def check_weights(path: str | Path, order: Order | None = None) -> GPT2Header:
    """Run all checks of ``load_weights`` without storing the weights."""
    header = read_header(path)
    _read_tensors(path, header, order, None)
    return header


def _read_tensors(
    path: str | Path, header: GPT2Header, order: Order | None, into: Mapping[str, NDArray[np.float32]] | None
) -> None:
    if header.version == 2 and order is None:
        order = find_order(path, header)
    with Path(path).open("rb") as file:
        file.seek(HEADER_BYTES)
        for name, stored in _layout(header, order or "layers").items():
            if into is None:
                read_floats(file, path, name, stored.dtype, stored.shape)
                continue
            flat = flat_view(into[name], name)
            rows = min(stored.shape[0], into[name].shape[0])
            shape = (rows, *stored.shape[1:])
            read_floats(file, path, name, stored.dtype, shape, flat[: math.prod(shape)])
            if rows < stored.shape[0]:
                read_floats(file, path, f"{name} (padding)", stored.dtype, (stored.shape[0] - rows, *stored.shape[1:]))
            flat[math.prod(shape) :] = 0


def _layout(header: GPT2Header, order: Order) -> dict[str, _StoredTensor]:
    """Return the shape, dtype and offset of each tensor, in the order of the file."""
    version, stored_shapes = VERSIONS[header.version], tensor_shapes(header)
    layout: dict[str, _StoredTensor] = {}
    offset = HEADER_BYTES
    for name in TENSORS if order == "layers" or header.version != 2 else NORMS_LAST:
        dtype = version.norm_dtype if name in NORMS else version.dtype
        layout[name] = _StoredTensor(stored_shapes[name], dtype, offset)
        offset += math.prod(stored_shapes[name]) * item_bytes(dtype)
    return layout


def find_order(path: str | Path, header: GPT2Header) -> Order:
    """Detect the tensor order of a version 2 file from its content.

    The two orders place the float32 layernorms at different offsets, among bfloat16 weights. Read as bfloat16, the
    lower halves of float32 numbers are implausible weights (huge, tiny or NaN), so the layernorms are where there are
    more of these. If neither order has any, the layernorms hold bfloat16 values stored as float32 (such as the ones
    and zeros of a new model), and are where fewer lower halves are nonzero. Raises RefusedError if both counts are
    equal, as in a file of zeros.
    """
    implausible, nonzero = zip(*(_count_halves(path, header, order) for order in ("layers", "norms last")), strict=True)
    if implausible[0] != implausible[1]:
        return "layers" if implausible[0] > implausible[1] else "norms last"
    if nonzero[0] != nonzero[1]:
        return "layers" if nonzero[0] < nonzero[1] else "norms last"
    raise RefusedError(
        path,
        "a version 2 file whose content fits both tensor orders",
        "content that fits one of them",
        "convert it with `llmc convert --order layers` or `--order norms-last`",
    )


def _count_halves(path: str | Path, header: GPT2Header, order: Order) -> tuple[int, int]:
    """Count the implausible and the nonzero lower halves of the float32 at the layernorm offsets of ``order``."""
    implausible = nonzero = 0
    for name, stored in _layout(header, order).items():
        if name in NORMS:
            halves = map_array(path, "uint16", stored.offset, 2 * math.prod(stored.shape))[::2]
            exponents = (halves >> 7) & 0xFF
            # Weights lie between 2^-40 and 2^16. Exponent 0 (zeros and denormals) also occurs in a file of zeros.
            implausible += int(np.count_nonzero((exponents != 0) & ((exponents < 127 - 40) | (exponents > 127 + 16))))
            nonzero += int(np.count_nonzero(halves))
    return implausible, nonzero


def save_weights(path: str | Path, header: GPT2Header, tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """Write a model file of version 1, 3 or 5, given by the header, from float32 tensors with the names of TENSORS.

    wte must have Vp rows; version 1 stores the first V. Version 5 rounds to bfloat16, to nearest with ties to even.
    Raises VersionError for another version and RangeError for an invalid header.
    """
    if header.version not in VERSIONS or not VERSIONS[header.version].written:
        written = ", ".join(str(version) for version, entry in VERSIONS.items() if entry.written)
        raise VersionError(path, f"version {header.version} requested", f"a version that can be written: {written}")
    _check_fields(path, header)
    version = VERSIONS[header.version]
    for name, shape in _shapes(
        header.max_seq_len, header.num_layers, header.channels, header.padded_vocab_size
    ).items():
        if tensors[name].shape != shape:
            raise ValueError(f"{path}: found shape {tensors[name].shape} for {name}, expected {shape}")
    slots = new_slots(Kind.GPT2_MODEL, header.version)
    slots[2:7] = header[2:7]
    slots[7] = header.padded_vocab_size if version.padded else 0
    with atomic_write(path) as file:
        file.write(slots.data)
        for name, shape in tensor_shapes(header).items():
            write_floats(file, tensors[name][: shape[0]], version.norm_dtype if name in NORMS else version.dtype)
