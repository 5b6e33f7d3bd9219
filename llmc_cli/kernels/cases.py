"""Test cases of the operations, and one call of each on any backend.

``llmc verify`` and the tests run the same cases on a backend and on the float64 reference.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats import bfloat16
from llmc_cli.kernels.operation import Argument, Operation, Sizes
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.reference.kernels import REFERENCE
from llmc_cli.kernels.spec import Kernels


@dataclass(frozen=True)
class Case:
    """One call of ``operation``. Floating-point arrays are float64 whose values float32 represents exactly."""

    operation: str
    label: str
    args: dict[str, Any] = field(repr=False)


def cases(name: str) -> Iterator[Case]:
    """Yield the cases of one operation; they are the same each time."""
    operation = OPERATIONS[name]
    for seed, (sizes, variant) in enumerate(itertools.product(operation.test_sizes, operation.variants)):
        label = " ".join(f"{key}={value}" for key, value in (sizes | variant).items())
        if "HS" in sizes:
            sizes = {**sizes, "C": sizes["NH"] * sizes["HS"]}
        yield Case(name, label, _arguments(operation, sizes, variant, np.random.default_rng(seed)))


def _arguments(operation: Operation, sizes: Sizes, variant: Sizes, rng: np.random.Generator) -> dict[str, Any]:
    args: dict[str, Any] = {}
    for argument in operation.arguments:
        name = argument.name
        if name in variant:
            args[name] = variant[name]
        elif name in operation.values:
            args[name] = operation.values[name](sizes | variant, rng, args)
        else:
            mean, std = operation.normal.get(name, (0.0, 1.0))
            values = rng.standard_normal(argument.shape(sizes), np.float32) * np.float32(std) + np.float32(mean)
            args[name] = (np.square(values) if name in operation.squared else values).astype(np.float64)
    if operation.prepare:
        operation.prepare(REFERENCE, args)
    for name in operation.forward_results:
        args[name] = args[name].astype(np.float32).astype(np.float64)
    return args


def with_bf16_activations(case: Case) -> Case:
    """Return ``case`` with its activations rounded to bf16."""
    activations = {argument.name for argument in OPERATIONS[case.operation].arguments if argument.dtype == "act"}
    args = {
        name: _rounded(value) if name in activations and value is not None else value
        for name, value in case.args.items()
    }
    return Case(case.operation, case.label, args)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    single, bits = np.ascontiguousarray(values, np.float32), np.empty(values.shape, np.uint16)
    bfloat16.from_float32(single, bits)
    bfloat16.to_float32(bits, single)
    return single.astype(np.float64)


def run(kernels: Kernels, case: Case) -> dict[str, NDArray[Any]]:
    """Return the outputs of ``case`` on a backend by name. Outputs to be overwritten are filled with NaN first."""
    args = prepare(kernels, case)
    getattr(kernels, case.operation)(*args.values())
    outputs = [name for name in OPERATIONS[case.operation].bounds if case.args[name] is not None]
    return {name: kernels.download(args[name]) for name in outputs}


def prepare(kernels: Kernels, case: Case) -> dict[str, Any]:
    """Return the arguments of ``case`` in order, as arrays and weights of a backend."""
    operation = OPERATIONS[case.operation]
    read = operation.updated + (operation.accumulated if case.args.get("acc") else ())
    args: dict[str, Any] = {}
    for argument in operation.arguments:
        name, value = argument.name, case.args[argument.name]
        if not isinstance(value, np.ndarray):
            args[name] = value
            continue
        array = kernels.alloc(value.shape, array_dtype(kernels, argument))
        unset = name in operation.bounds and name not in read
        kernels.upload(array, np.full_like(value, np.nan) if unset else value)
        args[name] = bind_weight(kernels, argument, array)
    for name, other in operation.defaults.items():
        if args[name] is None:
            args[name] = args[other]
    return args


def array_dtype(kernels: Kernels, argument: Argument) -> Any:
    """Return the dtype of an array argument on a backend."""
    own = {"act": kernels.activation_dtype, "real": kernels.dtype, "weight": kernels.dtype}
    return own.get(argument.dtype, argument.dtype)


def bind_weight(kernels: Kernels, argument: Argument, array: Any) -> Any:
    """Return ``array`` as a published weight if the argument is one, else ``array`` itself."""
    if argument.dtype != "weight":
        return array
    weight = kernels.bind(array)
    kernels.publish([weight])
    return weight
