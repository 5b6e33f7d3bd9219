"""safetensors files, and folders of them (or of PyTorch checkpoints) as Hugging Face lays them out."""

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
from llmc_cli.formats.registry import Kind, identify
from llmc_cli.formats.stream import item_bytes, map_array, write_floats
from llmc_cli.formats.tensors import TensorInfo, Tensors, as_values
from llmc_cli.formats.torch_pickle import TorchZip

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library, too."""

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
"""What a folder is searched for, in this order."""


class _Span(NamedTuple):
    """Where a tensor's bytes lie behind the header."""

    begin: int
    end: int


class SafetensorsFile(Tensors):
    """One safetensors file. Its header is checked on opening; no tensor is read before it is asked for.

    Raises SizeError where lengths and offsets do not fit the file or leave gaps, and RangeError for a header that is
    not as it should be otherwise.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info = {}
        self._spans: dict[str, _Span] = {}
        header, self._data_at = self._read_header()
        for name, entry in header.items():
            if name != "__metadata__":
                self.info[name], self._spans[name] = self._parse(name, entry)
        self._check_spans()

    def __getitem__(self, name: str) -> NDArray[Any]:
        dtype, shape = self.info[name]
        stored = map_array(self.path, dtype, self._data_at + self._spans[name].begin, math.prod(shape))
        return as_values(self.path, name, stored.reshape(shape), dtype)

    def _read_header(self) -> tuple[dict[str, Any], int]:
        """The header and the offset of the bytes behind it."""
        size = self.path.stat().st_size
        if size < 8:
            raise SizeError(self.path, f"{size} bytes", "a safetensors file, of 8 at least")
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER, size - 8):
                raise SizeError(
                    self.path,
                    f"a header length of {length:,}",
                    f"at most {min(MAX_HEADER, size - 8):,}",
                    "it is cut off",
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
                raise RangeError(self.path, f"an entry for {name} without dtype, shape or data_offsets", "all three")
        if dtype not in DTYPES:
            raise RangeError(self.path, f"{name} as {dtype}", f"one of {', '.join(DTYPES)}", "store it as float32")
        needed = math.prod(shape) * item_bytes(DTYPES[dtype])
        if end - begin != needed:
            raise SizeError(self.path, f"{end - begin:,} bytes for {name}", f"{needed:,} for its shape")
        return TensorInfo(DTYPES[dtype], tuple(shape)), _Span(begin, end)

    def _check_spans(self) -> None:
        """The tensors must cover the rest of the file without gap or overlap."""
        end = 0
        for name, span in sorted(self._spans.items(), key=lambda item: item[1]):
            if span.begin != end:
                raise SizeError(self.path, f"{name} at byte {span.begin:,}", f"{end:,}: no gap and no overlap")
            end = span.end
        found = self.path.stat().st_size - self._data_at
        if found != end:
            raise SizeError(self.path, f"{found:,} bytes of tensors", f"{end:,} as its header says")


class ShardedCheckpoint(Tensors):
    """The tensors that an index file (``*.index.json``) finds in several files beside it.

    Raises RangeError where the index names files elsewhere, or tensors that their file does not hold.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        weight_map = _parse_json(path, path.read_bytes()).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RangeError(path, "no weight_map", "the file of each tensor")
        self.info = {}
        self._homes: dict[str, Tensors] = {}
        files: dict[str, Tensors] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or file in ("", ".", "..") or any(mark in file for mark in "/\\:\0"):
                raise RangeError(path, f"{file!r} as the file of {name}", "a name of a file in the same folder")
            if file not in files:
                files[file] = open_tensors(path.parent / file)
            if name not in files[file]:
                raise RangeError(path, f"no {name} in {file}", "what the index says", "the files do not fit together")
            self._homes[name] = files[file]
            self.info[name] = files[file].info[name]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._homes[name][name]


def open_tensors(path: str | Path) -> Tensors:
    """Open one file, safetensors or a PyTorch checkpoint, whichever its content is."""
    return TorchZip(path) if identify(path) is Kind.TORCH_ZIP else SafetensorsFile(path)


def open_checkpoint(folder: str | Path) -> Tensors:
    """Open the weights of a Hugging Face folder: the first of CHECKPOINT_FILES that is there.

    Raises FileNotFoundError where none is, and what opening the files raises.
    """
    for name in CHECKPOINT_FILES:
        path = Path(folder) / name
        if path.is_file():
            return ShardedCheckpoint(path) if name.endswith(".index.json") else open_tensors(path)
    missing = f"no weights there ({', '.join(CHECKPOINT_FILES)})"
    raise FileNotFoundError(errno.ENOENT, missing, os.fspath(folder))


def write_safetensors(path: str | Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str = "float32") -> None:
    """Write float32 arrays, in the order of the mapping, as float32 or bfloat16; transposed views cost one tensor's
    copy at a time at most. The metadata says what PyTorch's writers say, which transformers asks for."""
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
    """The JSON object in ``text``, in which no key may come twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RangeError(path, f"a header that cannot be parsed ({error})", "JSON", "the file is damaged") from None
    if not isinstance(parsed, dict):
        raise RangeError(path, f"a JSON {type(parsed).__name__}", "a JSON object", "the file is damaged")
    return parsed
