"""GPT-2 debug states: a batch with the logits, loss and gradients that a reference implementation computed for it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.errors import SizeError
from llmc_cli.formats.header import HEADER_BYTES, TRUNCATED_REMEDY, check_range, check_size, new_slots, read_slots
from llmc_cli.formats.registry import FORMATS, Kind
from llmc_cli.formats.stream import check_finite, check_ids, map_array, write_floats
from llmc_cli.formats.weights import MAGIC, TENSORS, GPT2Header, tensor_shapes

VERSIONS = FORMATS[Kind.GPT2_DEBUG_STATE].versions
WRITTEN_VERSION = 2

MODEL_LETTERS = ("T", "V", "L", "NH", "C", "Vp")
"""The usual letters for the slots of a model's header, in messages."""


class DebugHeader(NamedTuple):
    magic: int
    version: int
    batch: int  # B
    seq_len: int  # T


@dataclass(frozen=True)
class DebugState:
    """A memory-mapped debug state.

    The file does not contain V. Without a model, ``values`` therefore cannot be split into logits, loss and gradients.
    """

    path: Path
    header: DebugHeader
    x: NDArray[np.int32]  # (B, T) inputs
    y: NDArray[np.int32]  # (B, T) targets
    values: NDArray[np.float32]  # logits, loss and gradients, concatenated
    logits: NDArray[np.float32] | None  # (B, T, V)
    loss: float | None
    grads: dict[str, NDArray[np.float32]]  # by the names of TENSORS; wte (V, C) in version 1, (Vp, C) in version 2


def read_debug_state(path: str | Path, model: GPT2Header | None = None) -> DebugState:
    """Map a debug state of version 1 or 2.

    ``model`` is the header of the model that the state was computed for; it determines the exact file size. Without
    it, V, C and L are unknown: the file must then hold a whole number of float32, and at least the logits and
    gradients of a model with one layer, one channel and a V above every token id of the batch. Raises MagicError,
    VersionError, RangeError and SizeError.
    """
    slots = read_slots(path, Kind.GPT2_DEBUG_STATE)
    header = DebugHeader(*(int(slot) for slot in slots[:4]))
    for name, value in (("batch size", header.batch), ("sequence length", header.seq_len)):
        check_range(path, name, value, 1)
    ids = header.batch * header.seq_len
    values_at = HEADER_BYTES + 8 * ids
    size = Path(path).stat().st_size
    if model is not None:
        check_range(path, "sequence length", header.seq_len, 1, model.max_seq_len)
        shape = ", ".join(f"{name} {value}" for name, value in zip(MODEL_LETTERS, model[2:], strict=True))
        check_size(path, file_size(header, model), f"B {header.batch}, T {header.seq_len} and a model with {shape}")
    elif size < values_at or (size - values_at) % 4:
        raise SizeError(
            path,
            f"a file size of {size:,} bytes",
            f"{values_at:,} bytes for the header and the batch, plus a whole number of float32",
        )
    count = (size - values_at) // 4
    x, y = (
        map_array(path, "int32", HEADER_BYTES + 4 * ids * part, ids).reshape(header.batch, header.seq_len)
        for part in (0, 1)
    )
    vocab_size = 2**31 - 1 if model is None else model.vocab_size
    check_ids(path, "x", x.reshape(-1), vocab_size)
    check_ids(path, "y", y.reshape(-1), vocab_size)
    if model is None:
        _check_min_size(path, header, count, 1 + max(int(x.max()), int(y.max())))
    values: NDArray[np.float32] = map_array(path, "float32", values_at, count)
    if model is None:
        return DebugState(Path(path), header, x, y, values, None, None, {})
    logits_count = ids * model.vocab_size
    logits = values[:logits_count].reshape(header.batch, header.seq_len, model.vocab_size)
    grads: dict[str, NDArray[np.float32]] = {}
    start = logits_count + 1
    for name, grad_shape in _grad_shapes(header, model).items():
        end = start + math.prod(grad_shape)
        grads[name] = values[start:end].reshape(grad_shape)
        start = end
    return DebugState(Path(path), header, x, y, values, logits, float(values[logits_count]), grads)


def check_debug_state(path: str | Path, model: GPT2Header | None = None) -> DebugState:
    """Read a debug state, and also raise NonFiniteError for a NaN or infinity in logits, loss or gradients."""
    state = read_debug_state(path, model)
    if state.logits is None or state.loss is None:
        check_finite(path, "logits, loss and gradients", state.values)
        return state
    for name, values in {"logits": state.logits, "loss": np.array([state.loss], np.float32), **state.grads}.items():
        check_finite(path, name, values)
    return state


def write_debug_state(
    path: str | Path,
    x: NDArray[np.int32],
    y: NDArray[np.int32],
    logits: NDArray[np.float32],
    loss: float,
    grads: Mapping[str, NDArray[np.float32]],
) -> None:
    """Write a debug state of version 2.

    x and y are (B, T), logits (B, T, V), ``loss`` is the mean, and ``grads`` has an array for each of TENSORS, with
    (Vp, C) for wte.
    """
    if not x.shape == y.shape == logits.shape[:2]:
        raise ValueError(f"the shapes of x {x.shape}, y {y.shape} and logits {logits.shape} do not match")
    slots = new_slots(Kind.GPT2_DEBUG_STATE, WRITTEN_VERSION)
    slots[2:4] = x.shape
    with atomic_write(path) as file:
        file.write(slots.data)
        file.write(np.ascontiguousarray(x, "<i4").data)
        file.write(np.ascontiguousarray(y, "<i4").data)
        write_floats(file, logits, "float32")
        write_floats(file, np.array([loss], np.float32), "float32")
        for name in TENSORS:
            write_floats(file, grads[name], "float32")


def file_size(header: DebugHeader, model: GPT2Header) -> int:
    """Return the size in bytes of a debug state with header ``header`` for a model with header ``model``."""
    return HEADER_BYTES + 8 * header.batch * header.seq_len + 4 * _value_count(header, model)


def _grad_shapes(header: DebugHeader, model: GPT2Header) -> dict[str, tuple[int, ...]]:
    # In a model file, wte has Vp rows in version 3 and V rows in version 1.
    return tensor_shapes(model._replace(version=3 if VERSIONS[header.version].padded else 1))


def _value_count(header: DebugHeader, model: GPT2Header) -> int:
    """Return the number of float32 in the logits, the loss and the gradients."""
    grads = sum(math.prod(shape) for shape in _grad_shapes(header, model).values())
    return header.batch * header.seq_len * model.vocab_size + 1 + grads


def _check_min_size(path: str | Path, header: DebugHeader, count: int, vocab_size: int) -> None:
    """Raise SizeError if ``count`` values are too few for any model with at least ``vocab_size`` tokens."""
    smallest = GPT2Header(MAGIC, 3, header.seq_len, vocab_size, 1, 1, 1, vocab_size)
    min_count = _value_count(header, smallest)
    if count < min_count:
        raise SizeError(
            path,
            f"{count:,} float32 after the batch",
            f"at least {min_count:,}, since the batch has token ids up to {vocab_size - 1:,}",
            TRUNCATED_REMEDY,
        )
