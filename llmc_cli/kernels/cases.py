"""The operations of ``spec.Kernels`` as data — shapes, sizes, variants, bounds — and one call of each.

``llmc verify`` and the tests run the same cases on any backend, beside the float64 reference.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats import bfloat16
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.kernels.spec import Array, Kernels

REFERENCE = ReferenceKernels()

Sizes: TypeAlias = dict[str, int]
"""Lengths of axes, by the letters of spec.py (I, O: a linear layer's inputs and outputs)."""

EPS = 1e-5

DOUBLE = {("adamw", "hyper"), ("adamw", "sumsq"), ("sum_squares", "out")}
"""Arguments that are float64 in every backend."""

ACTIVATIONS = {
    "x",
    "dx",
    "y",
    "dy",
    "res",
    "dres",
    "delta",
    "act",
    "pre",
    "dpre",
    "qkv",
    "dqkv",
    "keys",
    "values",
}
"""And ``out`` and ``dout`` of attention."""

SCALES = {"pre": 3.0, "res": 3.0, "qkv": 1.5, "m": 0.1}
"""Standard deviations of what is drawn, where not 1."""

MEANS = {"delta": 2.0, "res": 2.0}
"""Means, where not 0: a variance must not lose its digits to them."""


class Operation(NamedTuple):
    """One operation: where its cases come from, and how close its outputs must be."""

    arguments: str  # in the order of its signature; an array with its axes as name:axis,axis
    bounds: dict[str, float]  # by output: the largest max|error| / max|reference| in float32; outputs are not inputs
    sizes: tuple[Sizes, ...]
    variants: tuple[dict[str, Any], ...] = ({},)  # arguments that differ, each with all sizes
    updated: tuple[str, ...] = ()  # outputs whose old values count, whatever ``acc`` says


MULTIPLIED = {
    "linear_forward": ("y",), "linear_backward": ("dx", "dw"), "linear_gelu_forward": ("act", "pre"),
    "gelu_linear_backward": ("dpre", "dw"), "head_loss": ("losses", "dx", "dw"), "head_logits": ("logits",),
}  # fmt: skip
"""Outputs that depend on the precision of matrix products."""

PRODUCT_BOUNDS = {"fp32": 0.0, "bf16x3": 2.0**-13, "tf32": 2.0**-9, "bf16": 2.0**-6}
"""On these outputs, in place of their bounds in float32 where it is more: twice the largest error of a product. Two
numbers rounded to bf16 give one that is off by up to 2^-7, to TF32 by 2^-10; three products of two parts by
3 · 2^-16."""

ATTENTION_BOUND = 2.0**-4
"""On attention in training in bf16: an error of a score is one of its exponent, and a score may be 10."""

ROUNDED_BOUND = 2.0**-7
"""On activations that are kept in bf16, and statistics of them: twice what rounding takes from them."""

FORWARD_RESULTS = {"residual_norm_backward": ("mean", "rstd"), "attention_backward": ("out", "lse")}
"""Inputs that must be what the forward operation gives for the others."""

ACC: tuple[dict[str, Any], ...] = ({"acc": False}, {"acc": True})

ADDED = ("dw", "db", "dwpe")
"""Outputs that ``acc`` makes an operation add to."""


def _sizes(letters: str, *rows: tuple[int, ...]) -> tuple[Sizes, ...]:
    return tuple(dict(zip(letters.split(), row, strict=True)) for row in rows)


# ragged on purpose: around the blocks of 16, 32 and 64 that kernels work in, and single rows and columns
EMBEDDING = _sizes("V T N C", (5, 3, 7, 1), (11, 8, 16, 66), (50, 40, 333, 96))
NORM = _sizes("N C", (1, 3), (5, 17), (33, 64), (70, 200))
LINEAR = _sizes("N I O", (1, 1, 1), (1, 24, 40), (7, 5, 13), (64, 48, 130), (130, 96, 33), (6, 96, 35))
HEAD = _sizes("N C V Vp", (1, 3, 5, 8), (9, 17, 100, 128), (300, 24, 250, 256), (4100, 3, 5, 8))  # the last in turns
FLAT = _sizes("P", (1,), (1000,), (40_000,), (300_001,))
ATTENTION = _sizes(
    "B T NH HS",
    (1, 1, 2, 8), (1, 2, 2, 8), (2, 31, 3, 1), (1, 33, 2, 8), (1, 64, 2, 8), (1, 70, 1, 16), (1, 100, 2, 8),
    (2, 65, 2, 64), (1, 40, 2, 80), (1, 257, 2, 8),
)  # fmt: skip
CACHED = _sizes(
    "S T NH HS Tmax",
    (1, 1, 2, 8, 4), (3, 1, 3, 16, 64), (2, 2, 1, 1, 33), (2, 5, 2, 64, 100), (3, 33, 2, 80, 100), (2, 70, 1, 8, 71),
)  # fmt: skip

OPERATIONS = {
    "embedding_forward": Operation("x:N,C wte:V,C wpe:T,C ids:N positions:N", {"x": 1e-7}, EMBEDDING),
    "embedding_backward": Operation(
        "dwte:V,C dwpe:T,C dx:N,C ids:N positions:N acc", {"dwte": 1e-6, "dwpe": 1e-6}, EMBEDDING, ACC, ("dwte",)
    ),
    "residual_norm_forward": Operation(
        "res:N,C y:N,C mean:N rstd:N x:N,C delta:N,C bias:C w:C b:C eps",
        {"res": 2e-7, "y": 2e-6, "mean": 1e-6, "rstd": 1e-6},
        NORM,
        ({}, {"bias": None}, {"delta": None, "bias": None, "res": None}),
    ),
    "residual_norm_backward": Operation(
        "dx:N,C dw:C db:C dy:N,C res:N,C mean:N rstd:N w:C dres:N,C acc",
        {"dx": 2e-6, "dw": 2e-6, "db": 2e-6},
        NORM,
        (*ACC, {"acc": True, "dres": None}),
    ),
    "linear_forward": Operation("y:N,O x:N,I w:O,I b:O", {"y": 2e-6}, LINEAR, ({}, {"b": None})),
    "linear_backward": Operation(
        "dx:N,I dw:O,I db:O dy:N,O x:N,I w:O,I acc",
        {"dx": 2e-6, "dw": 2e-6, "db": 2e-6},
        LINEAR,
        (*ACC, {"acc": False, "db": None}, {"acc": True, "dx": None}),
    ),
    "linear_gelu_forward": Operation("act:N,O pre:N,O x:N,I w:O,I b:O", {"act": 2e-6, "pre": 2e-6}, LINEAR),
    "gelu_forward": Operation("act:N,O pre:N,O", {"act": 2e-6}, LINEAR),
    "gelu_linear_backward": Operation(
        "dpre:N,I dw:O,I db:O dy:N,O act:N,I pre:N,I w:O,I acc", {"dpre": 2e-6, "dw": 2e-6, "db": 2e-6}, LINEAR, ACC
    ),
    "attention_forward": Operation(
        "out:B,T,C lse:B,NH,T qkv:B,T,3C num_heads", {"out": 2e-6, "lse": 1e-6}, ATTENTION
    ),
    "attention_backward": Operation(
        "dqkv:B,T,3C dout:B,T,C out:B,T,C lse:B,NH,T qkv:B,T,3C num_heads", {"dqkv": 5e-6}, ATTENTION
    ),
    "attention_cached": Operation(
        "out:S,T,C keys:S,NH,Tmax,HS values:S,NH,Tmax,HS qkv:S,T,3C lengths:S num_heads",
        {"out": 2e-6, "keys": 0.0, "values": 0.0},
        CACHED,
        updated=("keys", "values"),
    ),
    "head_loss": Operation(
        "losses:N dx:N,C dw:Vp,C x:N,C w:Vp,C targets:N vocab_size dloss acc",
        {"losses": 1e-6, "dx": 5e-6, "dw": 5e-6},
        HEAD,
        (*ACC, {"acc": False, "dx": None, "dw": None}),
    ),
    "head_logits": Operation("logits:N,V x:N,C w:Vp,C", {"logits": 2e-6}, HEAD),
    "sum_squares": Operation("out:1 g:P", {"out": 1e-12}, FLAT),
    "adamw": Operation(
        "master:P m:P v:P g:P segments:K,3 hyper:8 sumsq:1",
        {"master": 5e-7, "m": 1e-6, "v": 1e-6},
        FLAT,
        ({"max_norm": 0.0}, {"max_norm": 0.3}, {"max_norm": 1e9}),
        ("master", "m", "v"),
    ),
}  # fmt: skip


def bound(operation: str, output: str, precision: str, rounded: bool = False) -> float:
    """The largest max|error| / max|reference| of an output; ``rounded``: activations are kept in bf16."""
    bounds = [OPERATIONS[operation].bounds[output]]
    if output in MULTIPLIED.get(operation, ()):
        bounds.append(PRODUCT_BOUNDS[precision])
    if precision == "bf16" and operation in ("attention_forward", "attention_backward"):
        bounds.append(ATTENTION_BOUND)
    if rounded and bounds[0] and (is_activation(operation, output) or output in ("mean", "rstd")):
        bounds.append(ROUNDED_BOUND)
    return max(bounds)


def is_activation(operation: str, name: str) -> bool:
    """Whether an argument is in the precision of activations."""
    return name in ACTIVATIONS or (name in ("out", "dout") and operation.startswith("attention"))


@dataclass(frozen=True)
class Case:
    """One call of ``operation``; floating-point arrays are float64 that float32 holds exactly."""

    operation: str
    label: str
    args: dict[str, Any] = field(repr=False)


def cases(operation: str) -> Iterator[Case]:
    """The cases of one operation, always the same."""
    table = OPERATIONS[operation]
    for number, (sizes, variant) in enumerate(itertools.product(table.sizes, table.variants)):
        label = " ".join(f"{name}={value}" for name, value in (sizes | variant).items())
        yield Case(operation, label, _arguments(operation, sizes, variant, np.random.default_rng(number)))


def as_kept(case: Case) -> Case:
    """``case`` as a backend has it that keeps activations in bf16."""
    args = {
        name: _rounded(value) if isinstance(value, np.ndarray) and is_activation(case.operation, name) else value
        for name, value in case.args.items()
    }
    return Case(case.operation, case.label, args)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    single, bits = np.ascontiguousarray(values, np.float32), np.empty(values.shape, np.uint16)
    bfloat16.from_float32(single, bits)
    bfloat16.to_float32(bits, single)
    return single.astype(np.float64)


def run(kernels: Kernels, case: Case) -> dict[str, NDArray[Any]]:
    """The outputs of ``case`` on a backend, by name. Those that are to be overwritten held NaN before."""
    args = prepare(kernels, case)
    getattr(kernels, case.operation)(*args.values())
    outputs = [name for name in OPERATIONS[case.operation].bounds if case.args[name] is not None]
    return {name: kernels.download(args[name]) for name in outputs}


def prepare(kernels: Kernels, case: Case) -> dict[str, Any]:
    """The arguments of ``case`` in order, as arrays and weights of a backend."""
    operation = OPERATIONS[case.operation]
    kept = operation.updated + (ADDED if case.args.get("acc") else ())
    args: dict[str, Any] = {}
    for name, value in case.args.items():
        if not isinstance(value, np.ndarray):
            args[name] = value
            continue
        array = kernels.alloc(value.shape, _dtype(kernels, case.operation, name, value))
        unset = name in operation.bounds and name not in kept
        kernels.upload(array, np.full_like(value, np.nan) if unset else value)
        args[name] = array
        if name == "w" and value.ndim == 2:
            args[name] = kernels.bind(array)
            kernels.publish([args[name]])
    if case.operation == "residual_norm_forward" and args["res"] is None:
        args["res"] = args["x"]  # the spec's own calls pass an array, too, though nothing is written to it
    return args


def _dtype(kernels: Kernels, operation: str, name: str, value: NDArray[Any]) -> Any:
    if value.dtype != np.float64 or (operation, name) in DOUBLE:
        return value.dtype
    return kernels.activation_dtype if is_activation(operation, name) else kernels.dtype


def _arguments(operation: str, sizes: Sizes, variant: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    sizes = _with_derived(sizes)
    scalars = {
        "acc": False,
        "eps": EPS,
        "num_heads": sizes.get("NH"),
        "vocab_size": sizes.get("V"),
        "dloss": 1.0 / sizes.get("N", 1),
        "max_norm": 0.0,
        **variant,
    }
    args: dict[str, Any] = {}
    for argument in OPERATIONS[operation].arguments.split():
        name, _, axes = argument.partition(":")
        if name in scalars:
            args[name] = scalars[name]
        elif name in SPECIAL:
            args[name] = SPECIAL[name](sizes, rng, args)
        else:
            shape = tuple(int(axis) if axis.isdigit() else sizes[axis] for axis in axes.split(","))
            drawn = rng.standard_normal(shape, np.float32) * np.float32(SCALES.get(name, 1.0))
            drawn += np.float32(MEANS.get(name, 0.0))
            args[name] = np.square(drawn).astype(np.float64) if name == "v" else drawn.astype(np.float64)
    if operation == "adamw":
        args["hyper"][-1] = scalars["max_norm"]
    if operation == "residual_norm_backward":
        res, w = args["res"], args["w"]
        REFERENCE.residual_norm_forward(res, np.empty_like(res), args["mean"], args["rstd"], res, None, None, w, w, EPS)
    if operation == "attention_backward":
        REFERENCE.attention_forward(args["out"], args["lse"], args["qkv"], args["num_heads"])
    for name in FORWARD_RESULTS.get(operation, ()):
        args[name] = args[name].astype(np.float32).astype(np.float64)
    return args


def _with_derived(sizes: Sizes) -> Sizes:
    if "HS" not in sizes:
        return sizes
    C = sizes["NH"] * sizes["HS"]
    return {**sizes, "C": C, "3C": 3 * C}


def _targets(sizes: Sizes, rng: np.random.Generator, args: dict[str, Any]) -> Array:
    targets = rng.integers(0, sizes["V"], sizes["N"], np.int32)
    if sizes["N"] > 1:
        targets[::4] = -1  # ignored
    return targets


def _lengths(sizes: Sizes, rng: np.random.Generator, args: dict[str, Any]) -> Array:
    """From an empty cache to one that the new positions fill."""
    return np.linspace(0, sizes["Tmax"] - sizes["T"], sizes["S"]).astype(np.int32)


def _segments(sizes: Sizes, rng: np.random.Generator, args: dict[str, Any]) -> Array:
    cuts = sorted({0, sizes["P"] // 3, sizes["P"] // 2, sizes["P"]})
    rows = [(start, end - start, n % 2) for n, (start, end) in enumerate(itertools.pairwise(cuts))]
    return np.array(rows, np.int64)


SPECIAL: dict[str, Callable[[Sizes, np.random.Generator, dict[str, Any]], Array]] = {
    "ids": lambda sizes, rng, args: rng.integers(0, sizes["V"], sizes["N"], np.int32),
    # the last position is used by no row, so that its gradient must become 0
    "positions": lambda sizes, rng, args: rng.integers(0, sizes["T"] - 1, sizes["N"], np.int32),
    "targets": _targets,
    "lengths": _lengths,
    "segments": _segments,
    "hyper": lambda sizes, rng, args: np.array([1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3, 0.0]),
    "sumsq": lambda sizes, rng, args: np.array([np.dot(args["g"], args["g"])]),
}
"""Arguments that are not just normal numbers; made from the sizes and the arguments before them."""
