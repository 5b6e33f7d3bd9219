"""The type of an entry in the table of operations."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from llmc_cli.kernels.spec import Array, Kernels

MATMUL_BOUNDS = {"fp32": 0.0, "bf16x3": 2.0**-13, "tf32": 2.0**-9, "bf16": 2.0**-6}
"""Bounds on outputs of matrix products by precision: at least twice the largest relative error of one product; 0: the
operation's own bound applies. The product of two numbers rounded to bf16 has a relative error of up to 2^-7, rounded to
TF32 2^-10, and computed as three products of bf16 parts 3 · 2^-16."""

BF16_ACTIVATION_BOUND = 2.0**-7
"""Bound on activations stored in bf16 and on their mean and rstd: twice the rounding error."""

Sizes: TypeAlias = dict[str, Any]
"""Axis lengths by the letters of spec.py (I, O: input and output width of a linear layer), and values of arguments."""


class Cost(NamedTuple):
    """The minimum cost of one call.

    FLOPs count a multiplication or an addition as one; they are exact for matrix products and approximate elsewhere.
    Bytes count every array once, or twice if it is both read and written, regardless of caches.
    """

    flops: int
    bytes: int


NO_COST = Cost(0, 0)


class ModelSizes(NamedTuple):
    """The sizes of a model and its batch that determine the array shapes of a training step."""

    B: int
    T: int
    C: int
    NH: int
    V: int
    Vp: int
    max_seq_len: int
    parameters: int
    eps: float

    def axes(self) -> Sizes:
        """Return the default axis lengths of an operation in this model."""
        B, T, C, NH = self[:4]
        return {"B": B, "S": B, "T": T, "N": B * T, "C": C, "NH": NH, "HS": C // NH, "V": self.V, "Vp": self.Vp,
                "P": self.parameters, "eps": self.eps, "acc": False}  # fmt: skip

    def random_ids(self) -> Array:
        return np.random.default_rng(1337).integers(0, self.V, self.B * self.T, np.int32)

    def positions(self) -> Array:
        return np.tile(np.arange(self.T, dtype=np.int32), self.B)


class Argument(NamedTuple):
    """An array argument and its axes, or a scalar, whose ``dtype`` is empty.

    dtype: "act" is the backend's ``activation_dtype`` and "real" its ``dtype``; "weight" is a matrix of "real" passed
    through ``bind``; others are NumPy's.
    """

    name: str
    dtype: str
    axes: tuple[str, ...]

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape; an axis is a letter, a number, or a number and a letter ("3C")."""
        factors = [re.fullmatch(r"(\d*)(\w*)", axis) for axis in self.axes]
        return tuple(int(each[1] or 1) * (sizes[each[2]] if each[2] else 1) for each in factors if each)


Values: TypeAlias = Callable[[Sizes, np.random.Generator, dict[str, Any]], Any]
"""Return the value of an argument in a test case, given the sizes, a generator and the arguments before it."""


@dataclass(frozen=True)
class Operation:
    """One operation of ``spec.Kernels``.

    A *use* is a named set of shapes at which a model calls the operation: its name and the axis lengths or arguments
    that differ from ``ModelSizes.axes``. An argument is an array, a scalar, None, or the name of an earlier argument
    to pass the same array twice.
    """

    signature: str  # arguments in order: name:dtype[axis,axis], or name for a scalar
    bounds: dict[str, float]  # by output: largest max|error| / max|reference| in float32
    cost: Callable[..., Cost]  # takes the operation's arguments
    test_sizes: tuple[Sizes, ...]
    variants: tuple[Sizes, ...] = ({},)  # test cases are the product of sizes and variants
    uses: Callable[[ModelSizes], dict[str, Sizes]] = lambda model: {"": {}}
    values: dict[str, Values] = field(default_factory=dict)  # of arguments that are not normally distributed
    normal: dict[str, tuple[float, float]] = field(default_factory=dict)  # mean and std of others, if not 0 and 1
    squared: tuple[str, ...] = ()  # arguments that must not be negative: squares of normal numbers
    accumulated: tuple[str, ...] = ()  # outputs that ``acc`` adds to
    updated: tuple[str, ...] = ()  # outputs that are always read before they are written
    defaults: dict[str, str] = field(default_factory=dict)  # the argument to pass instead of an array that is None
    prepare: Callable[[Kernels, dict[str, Any]], None] | None = None  # computes ``forward_results`` from other inputs
    forward_results: tuple[str, ...] = ()  # inputs that must be results of the forward operation
    host_arguments: tuple[str, ...] = ()  # arrays whose elements the cost depends on
    matmul_outputs: tuple[str, ...] = ()  # outputs whose error depends on the precision of matrix products
    bf16_bound: float = 0.0  # lower limit of every output's bound if matrix products are in bf16

    @functools.cached_property
    def arguments(self) -> tuple[Argument, ...]:
        parsed = re.findall(r"(\w+)(?::(\w+)\[([^]]*)])?", self.signature)
        return tuple(Argument(name, dtype, tuple(axes.split(",")) if axes else ()) for name, dtype, axes in parsed)

    def bound(self, output: str, precision: str, bf16_activations: bool = False) -> float:
        """Return the largest allowed max|error| / max|reference| of an output."""
        bounds = [self.bounds[output]]
        if output in self.matmul_outputs:
            bounds.append(MATMUL_BOUNDS[precision])
        if precision == "bf16":
            bounds.append(self.bf16_bound)
        dtype = next(argument.dtype for argument in self.arguments if argument.name == output)
        if bf16_activations and bounds[0] and (dtype == "act" or output in ("mean", "rstd")):
            bounds.append(BF16_ACTIVATION_BOUND)
        return max(bounds)


def nbytes(*arrays: Array | None) -> int:
    """Return the total size in bytes of the arrays that are not None."""
    return sum(array.nbytes for array in arrays if array is not None)
