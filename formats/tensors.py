"""What the checkpoints of other projects have in common: tensors by name, each loaded when it is asked for."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.stream import FLOATS, check_finite, widen


class TensorInfo(NamedTuple):
    dtype: str  # a name of stream.STORED_AS
    shape: tuple[int, ...]


class Tensors(Mapping[str, NDArray[Any]]):
    """Arrays by name; ``info`` says what each is without loading it.

    Floating point comes as float32: mapped from the file, read-only, where it is stored as such, else converted into a
    new array at each access. Integers and booleans come as they are stored. An access raises NonFiniteError where
    there is a NaN or infinity.
    """

    info: dict[str, TensorInfo]

    @abstractmethod
    def __getitem__(self, name: str) -> NDArray[Any]: ...

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)


def as_values(path: str | Path, name: str, stored: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The tensor whose elements lie in a file as ``stored``; see Tensors."""
    if dtype not in FLOATS:
        return stored
    values: NDArray[np.float32] = stored
    if dtype != "float32":
        values = np.empty(stored.shape, np.float32)
        widen(stored, dtype, values)
    check_finite(path, name, values)
    return values
