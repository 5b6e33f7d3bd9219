"""safetensors files, and Hugging Face model folders with safetensors files or PyTorch checkpoints."""

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.errors import RangeError, SizeError
from llmc_cli.formats.header import TRUNCATED_REMEDY
from llmc_cli.formats.registry import Kind, identify
from llmc_cli.formats.stream import item_bytes, map_array, write_floats
from llmc_cli.formats.tensors import TensorInfo, Tensors, decode_tensor
from llmc_cli.formats.torch_pickle import TorchZip

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""

DTYPES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
}

CHECKPOINT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""The weight files of a model folder, in the order in which they are searched."""


class _Span(NamedTuple):
    """The byte range of a tensor, relative to the end of the header."""

    begin: int
    end: int


class SafetensorsFile(Tensors):
    """A safetensors file. Opening it reads and checks the header only; a tensor is read on access.

    Raises SizeError if lengths and offsets do not match the file size or leave gaps, and RangeError for a header that
    is invalid in another way.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info = {}
        self._spans: dict[str, _Span] = {}
        header, self._data_offset = self._read_header()
        for name, entry in header.items():
            if name != "__metadata__":
                self.info[name], self._spans[name] = self._parse(name, entry)
        self._check_spans()

    def __getitem__(self, name: str) -> NDArray[Any]:
        dtype, shape = self.info[name]
        stored = map_array(self.path, dtype, self._data_offset + self._spans[name].begin, math.prod(shape))
        return decode_tensor(self.path, name, stored.reshape(shape), dtype)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """Return the header and the offset of the data after it."""
        size = self.path.stat().st_size
        if size < 8:
            raise SizeError(self.path, f"a file size of {size} bytes", "at least 8 bytes for a safetensors file")
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise SizeError(
                    self.path,
                    f"a header length of {length:,} bytes",
                    f"at most {min(MAX_HEADER_BYTES, size - 8):,}",
                    "the file is truncated or damaged: download or write it again",
                )
            text = file.read(length)
        return _parse_json(self.path, text), 8 + length

    def _parse(self, name: str, entry: Any) -> tuple[TensorInfo, _Span]:
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if _are_sizes(
                [*shape, begin, end]
            ):
                pass
            case _:
                raise RangeError(
                    self.path,
                    f"a header entry for {name} without a valid dtype, shape or data_offsets",
                    "all three",
                    "the file is damaged",
                )
        if dtype not in DTYPES:
            raise RangeError(
                self.path, f"dtype {dtype} for {name}", f"one of {', '.join(DTYPES)}", "save the tensor as float32"
            )
        needed = math.prod(shape) * item_bytes(DTYPES[dtype])
        if end - begin != needed:
            raise SizeError(
                self.path, f"{end - begin:,} bytes for {name}", f"{needed:,} bytes for its shape", "the file is damaged"
            )
        return TensorInfo(DTYPES[dtype], tuple(shape)), _Span(begin, end)

    def _check_spans(self) -> None:
        """Check that the tensors cover the rest of the file without gaps or overlaps."""
        end = 0
        for name, span in sorted(self._spans.items(), key=lambda item: item[1]):
            if span.begin != end:
                raise SizeError(
                    self.path,
                    f"{name} at byte {span.begin:,}",
                    f"byte {end:,}, without a gap or an overlap",
                    "the file is damaged",
                )
            end = span.end
        found = self.path.stat().st_size - self._data_offset
        if found != end:
            remedy = TRUNCATED_REMEDY if found < end else "the file has extra bytes at the end"
            raise SizeError(self.path, f"{found:,} bytes of tensors", f"{end:,} bytes, as the header says", remedy)


class ShardedCheckpoint(Tensors):
    """The tensors of a checkpoint in several files, which an index (``*.index.json``) in the same folder lists.

    Raises RangeError if the index names files in another folder, or tensors that their file does not contain.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        weight_map = _parse_json(path, path.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RangeError(path, "no weight_map", "a weight_map with the file name of each tensor")
        self.info = {}
        self._file_of: dict[str, Tensors] = {}
        files: dict[str, Tensors] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
                raise RangeError(path, f"{file!r} as the file of {name}", "the name of a file in the same folder")
            if file not in files:
                files[file] = open_tensors(path.parent / file)
            if name not in files[file]:
                raise RangeError(
                    path,
                    f"no tensor {name} in {file}",
                    "the tensor, as the index says",
                    "the index and the files do not match: download them again",
                )
            self._file_of[name] = files[file]
            self.info[name] = files[file].info[name]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._file_of[name][name]


def open_tensors(path: str | Path) -> Tensors:
    """Open one safetensors file or PyTorch checkpoint; the kind is determined from its content."""
    return TorchZip(path) if identify(path) is Kind.TORCH_ZIP else SafetensorsFile(path)


def open_checkpoint(folder: str | Path) -> Tensors:
    """Open the weights of a Hugging Face folder: the first of CHECKPOINT_FILES that exists.

    Raises FileNotFoundError if none exists, and the errors of SafetensorsFile, ShardedCheckpoint and TorchZip.
    """
    for name in CHECKPOINT_FILES:
        path = Path(folder) / name
        if path.is_file():
            return ShardedCheckpoint(path) if name.endswith(".index.json") else open_tensors(path)
    missing = f"found no weights, expected one of {', '.join(CHECKPOINT_FILES)}"
    raise FileNotFoundError(errno.ENOENT, missing, os.fspath(folder))


def write_safetensors(path: str | Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str = "float32") -> None:
    """Write float32 arrays as float32 or bfloat16, in the order of the mapping.

    A transposed view is copied in chunks, at most one tensor at a time. The metadata has the entry
    ``"format": "pt"``, which transformers requires.
    """
    code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        begin, end = end, end + values.size * item_bytes(dtype)
        header[name] = {"dtype": code, "shape": list(values.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for values in tensors.values():
            write_floats(file, values, dtype)


def _are_sizes(values: list[Any]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Duplicate keys are an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("duplicate key")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RangeError(path, f"invalid JSON ({error})", "a JSON object", "the file is damaged") from None
    if not isinstance(parsed, dict):
        raise RangeError(path, f"a JSON value of type {type(parsed).__name__}", "a JSON object", "the file is damaged")
    return parsed
