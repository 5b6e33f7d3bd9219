"""An arena: one allocation with named views."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.spec import Array

ALIGN = 16  # elements: 64 bytes of float32, a cache line

Tokens: TypeAlias = NDArray[np.int32]
"""Ids or targets on the host."""

Shapes = Mapping[str, tuple[int, ...]]
Alloc = Callable[[tuple[int, ...], Any], Array]


class Arena(Mapping[str, Array]):
    """A flat array, ``flat``, and named views into it, in the order of ``shapes``.

    Each view starts at a multiple of ``align`` elements. With ``align`` 1 there are no gaps: an arena of parameters has
    the layout of a model file's body.
    """

    def __init__(self, alloc: Alloc, shapes: Shapes, dtype: Any, align: int = 1) -> None:
        self.offsets: dict[str, int] = {}
        end = 0
        for name, shape in shapes.items():
            start = -(-end // align) * align
            self.offsets[name] = start
            end = start + math.prod(shape)
        self.flat: Array = alloc((end,), dtype)
        self._views = {
            name: self.flat[start : start + math.prod(shapes[name])].reshape(shapes[name])
            for name, start in self.offsets.items()
        }

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def arena_bytes(shapes: Shapes, dtype: Any, align: int = 1) -> int:
    """Return the size of an ``Arena`` of these shapes without allocating it."""
    end = 0
    for shape in shapes.values():
        end = -(-end // align) * align + math.prod(shape)
    return end * int(np.dtype(dtype).itemsize)
