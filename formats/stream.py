"""Arrays of numbers to and from files: mapped, or streamed in chunks through a small buffer."""

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
"""Elements read, checked or written at a time."""

STORED_AS = {
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
"""NumPy's name for how elements of each dtype lie in a file; bfloat16 has none and is taken as its bits."""

FLOATS = ("float32", "float16", "bfloat16")


def item_bytes(dtype: str) -> int:
    """Bytes that one element takes in a file."""
    return np.dtype(STORED_AS[dtype]).itemsize


def map_array(path: str | Path, dtype: str, offset: int, count: int) -> NDArray[Any]:
    """(count,) elements from byte ``offset`` on, read-only, mapped from the file (bfloat16 as uint16 bits)."""
    if count == 0:  # nothing to map, and an empty range cannot be
        return np.empty(0, STORED_AS[dtype])
    mapped = np.memmap(path, dtype=STORED_AS[dtype], mode="r", offset=offset, shape=(count,))
    return mapped.view(np.ndarray)


def widen(raw: NDArray[Any], dtype: str, out: NDArray[np.float32]) -> None:
    """out (float32) = raw (same shape), stored as ``dtype``, one of FLOATS."""
    if dtype == "bfloat16":
        bfloat16.to_float32(raw, out)
    else:
        out[...] = raw


def as_float32(values: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """``values`` as a flat view; ValueError where they are not C-contiguous float32, so that a view would be a copy."""
    if values.dtype != np.float32 or not values.flags.c_contiguous:
        raise ValueError(f"{name}: expected a C-contiguous float32 array, got {values.dtype}")
    return values.reshape(-1)


def blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """``values`` in C order, in views of about CHUNK elements (of a leading index at least, where not contiguous)."""
    if values.flags.c_contiguous:
        values = values.reshape(-1)
    step = max(1, CHUNK // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), step):
        yield values[start : start + step]


def check_finite(path: str | Path, name: str, values: NDArray[np.float32]) -> None:
    """Raise NonFiniteError naming the first NaN or infinity of ``values``."""
    start = 0
    for block in blocks(values):
        _check_block(path, name, values.shape, start, block)
        start += block.size


def _check_block(path: str | Path, name: str, shape: tuple[int, ...], start: int, block: NDArray[np.float32]) -> None:
    finite = np.isfinite(block)
    if not finite.all():
        at = int(np.argmin(finite))
        index = np.unravel_index(start + at, shape) if shape else ()
        place = f"{name}[{', '.join(str(int(i)) for i in index)}]"
        raise NonFiniteError(path, f"{block.reshape(-1)[at]} at {place}", "finite numbers", "the file is damaged")


def read_floats(
    file: io.BufferedReader,
    path: str | Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    out: NDArray[np.float32] | None = None,
) -> None:
    """Read the tensor ``name``, stored as ``dtype``, from where ``file`` stands, into out (flat, prod(shape) elements).

    Without ``out`` it is only checked. Raises NonFiniteError at the first NaN or infinity, and SizeError where
    the file ends.
    """
    count = math.prod(shape)
    raw = np.empty(min(CHUNK, count), STORED_AS[dtype])
    scratch = np.empty(raw.size if out is None else 0, np.float32)
    for start in range(0, count, CHUNK):
        piece = raw[: min(CHUNK, count - start)]
        if file.readinto(piece.data) != piece.nbytes:
            raise SizeError(path, f"the end of the file within {name}", "all of it", "it changed while it was read")
        values = scratch[: piece.size] if out is None else out[start : start + piece.size]
        widen(piece, dtype, values)
        _check_block(path, name, shape, start, values)


def write_floats(file: BinaryIO, values: NDArray[np.float32], dtype: str) -> None:
    """Write float32 values, in C order, as float32 or bfloat16 (rounded to the nearest, ties to even)."""
    for block in blocks(values):
        block = np.ascontiguousarray(block, "<f4")
        if dtype == "bfloat16":
            bits = np.empty(block.shape, "<u2")
            bfloat16.from_float32(block, bits)
            file.write(bits.data)
        else:
            file.write(block.data)


def check_ids(path: str | Path, name: str, ids: NDArray[Any], vocab_size: int) -> None:
    """Raise RangeError naming the first of the token ids ``ids`` (one dimension) outside 0 … vocab_size - 1."""
    start = 0
    for block in blocks(ids):
        if int(block.min()) < 0 or int(block.max()) >= vocab_size:
            at = int(np.argmax((block < 0) | (block >= vocab_size)))
            raise RangeError(
                path,
                f"token id {int(block[at])} at {name}[{start + at}]",
                f"0 to {vocab_size - 1}",
                "it was made with another vocabulary, or is damaged",
            )
        start += block.size
