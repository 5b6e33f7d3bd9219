"""Base class for checkpoints of other projects: a mapping of names to tensors, which are loaded on access."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.stream import FLOATS, check_finite, widen


class TensorInfo(NamedTuple):
    dtype: str  # a key of stream.STORED_DTYPES
    shape: tuple[int, ...]


class Tensors(Mapping[str, NDArray[Any]]):
    """A mapping of names to arrays. ``info`` has the dtype and shape of each without loading it.

    Floating-point tensors are returned as float32: a read-only memory map if the file stores float32, otherwise a new
    converted array at each access. Integers and booleans are returned as stored. Accessing a tensor raises
    NonFiniteError if it contains a NaN or infinity.
    """

    info: dict[str, TensorInfo]

    @abstractmethod
    def __getitem__(self, name: str) -> NDArray[Any]: ...

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)


def decode_tensor(path: str | Path, name: str, stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Convert the elements ``stored`` in a file to the array that ``Tensors`` returns, and check that it is finite."""
    if dtype not in FLOATS:
        return stored
    values: NDArray[np.float32] = stored
    if dtype != "float32":
        values = np.empty(stored.shape, np.float32)
        widen(stored, dtype, values)
    check_finite(path, name, values)
    return values
