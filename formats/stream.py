"""Reading and writing arrays: memory-mapped, or streamed in chunks through a small buffer."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats import bfloat16
from llmc_cli.formats.errors import NonFiniteError, RangeError, SizeError

CHUNK = 1 << 18
"""Number of elements read, checked or written at a time."""

STORED_DTYPES = {
    "float32": "<f4",
    "float16": "<f2",
    "bfloat16": "<u2",
    "bool": "?",
    "uint8": "u1",
    "int8": "i1",
    "uint16": "<u2",
    "int16": "<i2",
    "uint32": "<u4",
    "int32": "<i4",
    "uint64": "<u8",
    "int64": "<i8",
}
"""The NumPy dtype of the stored elements. NumPy has no bfloat16, which is read as its uint16 bits."""

FLOATS = ("float32", "float16", "bfloat16")


def item_bytes(dtype: str) -> int:
    """Return the size of one stored element in bytes."""
    return np.dtype(STORED_DTYPES[dtype]).itemsize


def map_array(path: str | Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """Map ``count`` elements at byte ``offset`` of a file, read-only (bfloat16 as uint16 bits)."""
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, STORED_DTYPES[dtype])
    mapped = np.memmap(path, dtype=STORED_DTYPES[dtype], mode="r", offset=offset, shape=(count,))
    return mapped.view(np.ndarray)


def widen(raw: NDArray[Any], dtype: str, out: NDArray[np.float32]) -> None:
    """Convert ``raw``, stored as ``dtype`` (one of FLOATS), to float32 in ``out``, of the same shape."""
    if dtype == "bfloat16":
        bfloat16.to_float32(raw, out)
    else:
        out[...] = raw


def flat_view(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Return a flat view of ``values``. Raises ValueError if they are not C-contiguous float32."""
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        layout = "C-contiguous" if values.flags.c_contiguous else "non-contiguous"
        raise ValueError(f"{name}: found a {layout} {values.dtype} array, expected a C-contiguous float32 array")
    return values.reshape(-1)


def blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield ``values`` in C order, in views of about CHUNK elements, or of whole rows if they are not contiguous."""
    if values.flags.c_contiguous:
        values = values.reshape(-1)
    step = max(1, CHUNK // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), step):
        yield values[start : start + step]


def check_finite(path: str | Path, name: str, values: NDArray[np.float32]) -> None:
    """Raise NonFiniteError, with the index, at the first NaN or infinity of ``values``."""
    start = 0
    for block in blocks(values):
        _check_block(path, name, values.shape, start, block)
        start += block.size


def _check_block(path: str | Path, name: str, shape: tuple[int, ...], start: int, block: NDArray[np.float32]) -> None:
    finite = np.isfinite(block)
    if not finite.all():
        first = int(np.argmin(finite))
        index = np.unravel_index(start + first, shape) if shape else ()
        element = f"{name}[{', '.join(str(int(i)) for i in index)}]"
        raise NonFiniteError(path, f"{block.reshape(-1)[first]} at {element}", "finite values", "the file is damaged")


def read_floats(
    file: io.BufferedReader,
    path: str | Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    out: NDArray[np.float32] | None = None,
) -> None:
    """Read the tensor ``name``, stored as ``dtype``, from the current position of ``file`` into the flat array ``out``.

    Without ``out`` the tensor is only checked. Raises NonFiniteError at the first NaN or infinity, and SizeError at
    the end of the file.
    """
    count = math.prod(shape)
    raw = np.empty(min(CHUNK, count), STORED_DTYPES[dtype])
    scratch = np.empty(raw.size if out is None else 0, np.float32)
    for start in range(0, count, CHUNK):
        piece = raw[: min(CHUNK, count - start)]
        if file.readinto(piece.data) != piece.nbytes:
            raise SizeError(
                path, f"the end of the file in {name}", f"{count:,} elements", "the file changed while it was read"
            )
        values = scratch[: piece.size] if out is None else out[start : start + piece.size]
        widen(piece, dtype, values)
        _check_block(path, name, shape, start, values)


def write_floats(file: BinaryIO, values: NDArray[np.float32], dtype: str) -> None:
    """Write float32 values in C order as ``dtype``: float32, or bfloat16 rounded to nearest, ties to even."""
    for block in blocks(values):
        block = np.ascontiguousarray(block, "<f4")
        if dtype == "bfloat16":
            bits = np.empty(block.shape, "<u2")
            bfloat16.from_float32(block, bits)
            file.write(bits.data)
        else:
            file.write(block.data)


def check_ids(path: str | Path, name: str, ids: NDArray[Any], vocab_size: int) -> None:
    """Raise RangeError at the first of the token ids (one dimension) outside 0 to vocab_size - 1."""
    start = 0
    for block in blocks(ids):
        if int(block.min()) < 0 or int(block.max()) >= vocab_size:
            first = int(np.argmax((block < 0) | (block >= vocab_size)))
            raise RangeError(
                path,
                f"token id {int(block[first])} at {name}[{start + first}]",
                f"0 to {vocab_size - 1}",
                "the tokens are of another vocabulary, or the file is damaged",
            )
        start += block.size
