"""One allocation, named views."""

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
    """A flat array ``flat`` and views into it by name, in the order of ``shapes``.

    With ``align`` 1 the views follow each other without gaps (parameters: the arena *is* the body of a model file);
    with ``align`` n each view starts at a multiple of n elements.
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
    """Bytes that an ``Arena`` of these shapes takes, without making one."""
    end = 0
    for shape in shapes.values():
        end = -(-end // align) * align + math.prod(shape)
    return end * int(np.dtype(dtype).itemsize)
