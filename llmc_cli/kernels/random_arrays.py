"""Arrays of random numbers on a backend, for measurements."""

from collections.abc import Callable
from typing import Any

import numpy as np

from llmc_cli.kernels.spec import Array, Kernels

SEED = 1337


NOISE = 1 << 20  # random numbers that are repeated over larger arrays


def fill(kernels: Kernels, array: Array, std: float = 1.0, shape: Callable[[Any], Any] = np.positive) -> Array:
    """The array, filled with normals, or with what ``shape`` makes of them, piece by piece: no second copy of a large
    one."""
    flat, noise = array.reshape(-1), np.random.default_rng(SEED).standard_normal(NOISE, np.float32) * np.float32(std)
    noise = shape(noise)
    for start in range(0, flat.size, NOISE):
        part = flat[start : start + NOISE]
        kernels.upload(part, noise[: part.size])
    return array
