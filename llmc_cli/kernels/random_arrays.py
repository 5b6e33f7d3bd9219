"""Random arrays and arguments on a backend, for measurements."""

from typing import Any

import numpy as np

from llmc_cli.kernels.cases import array_dtype, bind_weight
from llmc_cli.kernels.operation import Sizes
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.spec import Array, Kernels

SEED = 1337
BLOCK = 1 << 20  # random numbers, repeated in larger arrays
WEIGHT_STD = 0.02


def fill(kernels: Kernels, array: Array, std: float = 1.0, squared: bool = False) -> Array:
    """Fill the array with normally distributed numbers, or their squares, and return it.

    Works block by block, so that a large array is not copied as a whole.
    """
    flat = array.reshape(-1)
    block = np.random.default_rng(SEED).standard_normal(BLOCK, np.float32) * np.float32(std)
    if squared:
        block = np.square(block)
    for start in range(0, flat.size, BLOCK):
        part = flat[start : start + BLOCK]
        kernels.upload(part, block[: part.size])
    return array


def random_arguments(kernels: Kernels, name: str, sizes: Sizes) -> tuple[Any, ...]:
    """Return the arguments of one call of an operation at the sizes of a use (see ``Operation``).

    Outputs are filled too, so that their memory has been touched before the first call.
    """
    operation, rng = OPERATIONS[name], np.random.default_rng(SEED)
    args: dict[str, Any] = {}
    for argument in operation.arguments:
        value = sizes.get(argument.name)
        if isinstance(value, str):
            args[argument.name] = args[value]
        elif argument.name in sizes and not isinstance(value, np.ndarray):
            args[argument.name] = value
        elif value is not None or argument.name in operation.values:
            value = operation.values[argument.name](sizes, rng, args) if value is None else value
            args[argument.name] = value
            if isinstance(value, np.ndarray):
                args[argument.name] = kernels.alloc(value.shape, argument.dtype)
                kernels.upload(args[argument.name], value)
        else:
            array = kernels.alloc(argument.shape(sizes), array_dtype(kernels, argument))
            std = WEIGHT_STD if argument.dtype == "weight" else 1.0
            fill(kernels, array, std, argument.name in operation.squared)
            args[argument.name] = bind_weight(kernels, argument, array)
    if operation.prepare:
        operation.prepare(kernels, args)
    return tuple(args.values())
