"""The table of operations: for each one in ``spec.Kernels`` its arguments, test cases, error bounds, cost and uses.

The test cases, ``llmc verify``, the accounting of ``TimedKernels`` and the rows of ``llmc bench kernels`` all follow
from this table. To add an operation, declare it in spec.py, implement it in each backend and add an entry here.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from llmc_cli.kernels.operation import Cost, ModelSizes, Operation, Sizes, Values, nbytes
from llmc_cli.kernels.spec import Array, Kernels

EPS = 1e-5

ATTENTION_BF16_BOUND = 2.0**-4
"""Larger than for other products: the rounding error of a score, of magnitude up to 10, becomes a relative error of
its exponential."""


def _embedding_forward(x: Array, wte: Array, wpe: Array, ids: Array, positions: Array) -> Cost:
    return Cost(x.size, 3 * nbytes(x) + nbytes(ids, positions))  # a row of each table per row of x


def _embedding_backward(dwte: Array, dwpe: Array, dx: Array, ids: Array, positions: Array, acc: bool) -> Cost:
    return Cost(2 * dx.size, 3 * nbytes(dx) + (1 + acc) * nbytes(dwpe) + nbytes(ids, positions))


def _residual_norm_forward(
    res: Array, y: Array, mean: Array, rstd: Array,
    x: Array, delta: Array | None, bias: Array | None, w: Array, b: Array, eps: float,
) -> Cost:  # fmt: skip
    residual = nbytes(res, delta, bias) if delta is not None else 0
    return Cost(9 * y.size, nbytes(y, mean, rstd, x, w, b) + residual)


def _residual_norm_backward(
    dx: Array, dw: Array, db: Array,
    dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None, acc: bool,
) -> Cost:  # fmt: skip
    return Cost(15 * dx.size, nbytes(dx, dy, res, mean, rstd, w, dres) + (1 + acc) * nbytes(dw, db))


def _linear_forward(y: Array, x: Array, w: Any, b: Array | None) -> Cost:
    (N, O), I = y.shape, x.shape[1]  # noqa: E741
    return Cost(2 * N * O * I, nbytes(y, x, b) + O * I * x.itemsize)


def _linear_backward(dx: Array | None, dw: Array, db: Array | None, dy: Array, x: Array, w: Any, acc: bool) -> Cost:
    product = 2 * dy.size * x.shape[1]
    weight = dy.shape[1] * x.shape[1] * x.itemsize if dx is not None else 0
    return Cost(product * (1 if dx is None else 2), nbytes(dx, dy, x) + weight + (1 + acc) * nbytes(dw, db))


def _linear_gelu_forward(act: Array, pre: Array, x: Array, w: Any, b: Array) -> Cost:
    flops, moved = _linear_forward(pre, x, w, b)
    return Cost(flops + 10 * pre.size, moved + nbytes(act))


def _gelu_forward(act: Array, pre: Array) -> Cost:
    return Cost(10 * pre.size, nbytes(act, pre))


def _gelu_linear_backward(
    dpre: Array, dw: Array, db: Array, dy: Array, act: Array, pre: Array, w: Any, acc: bool
) -> Cost:
    flops, moved = _linear_backward(dpre, dw, db, dy, act, w, acc)
    return Cost(flops + 20 * pre.size, moved + nbytes(pre))


def _causal_product(B: int, T: int, C: int) -> int:
    """Return the FLOPs of one product over the lower triangle of (T,T), for all heads."""
    return B * T * (T + 1) * C


def _attention_forward(out: Array, lse: Array, qkv: Array, num_heads: int) -> Cost:
    return Cost(2 * _causal_product(*out.shape), nbytes(out, lse, qkv))


def _attention_backward(dqkv: Array, dout: Array, out: Array, lse: Array, qkv: Array, num_heads: int) -> Cost:
    # five products: the scores again, dv, the gradient of the scores, dq, dk
    return Cost(5 * _causal_product(*out.shape), nbytes(dqkv, dout, out, lse, qkv))


def _attention_cached(out: Array, keys: Array, values: Array, qkv: Array, lengths: Array, num_heads: int) -> Cost:
    S, T, C = out.shape
    cached = int(lengths.sum())  # positions of all sequences
    pairs = T * cached + S * T * (T + 1) // 2
    return Cost(4 * pairs * C, nbytes(out, qkv) + 2 * (cached + S * T) * C * keys.itemsize)


def _head_loss(
    losses: Array, dx: Array | None, dw: Array | None,
    x: Array, w: Any, targets: Array, vocab_size: int, dloss: float, acc: bool,
) -> Cost:  # fmt: skip
    products = 1 + (dx is not None) + (dw is not None)
    weight = vocab_size * x.shape[1] * x.itemsize
    return Cost(2 * products * x.size * vocab_size, nbytes(losses, dx, x, targets) + weight + (1 + acc) * nbytes(dw))


def _head_logits(logits: Array, x: Array, w: Any) -> Cost:
    return _linear_forward(logits, x, w, None)


def _sum_squares(out: Array, g: Array) -> Cost:
    return Cost(2 * g.size, nbytes(g))


def _adamw(master: Array, m: Array, v: Array, g: Array, segments: Array, hyper: Array, sumsq: Array) -> Cost:
    return Cost(14 * g.size, 2 * nbytes(master, m, v) + nbytes(g))


def _norm_statistics(kernels: Kernels, args: dict[str, Any]) -> None:
    res, w = args["res"], args["w"]
    y = kernels.alloc(res.shape, kernels.activation_dtype)
    kernels.residual_norm_forward(res, y, args["mean"], args["rstd"], res, None, None, w, w, EPS)


def _attention_results(kernels: Kernels, args: dict[str, Any]) -> None:
    kernels.attention_forward(args["out"], args["lse"], args["qkv"], args["num_heads"])


def _random_targets(sizes: Sizes, rng: np.random.Generator, args: dict[str, Any]) -> Array:
    targets = rng.integers(0, sizes["V"], sizes["N"], np.int32)
    if sizes["N"] > 1:
        targets[::4] = -1  # ignored
    return targets


def _cache_lengths(sizes: Sizes, rng: np.random.Generator, args: dict[str, Any]) -> Array:
    """Return lengths from 0 (empty cache) to Tmax - T (the new positions fill the cache)."""
    return np.linspace(0, sizes["Tmax"] - sizes["T"], sizes["S"]).astype(np.int32)


def _segments(sizes: Sizes, rng: np.random.Generator, args: dict[str, Any]) -> Array:
    cuts = sorted({0, sizes["P"] // 3, sizes["P"] // 2, sizes["P"]})
    rows = [(start, end - start, n % 2) for n, (start, end) in enumerate(itertools.pairwise(cuts))]
    return np.array(rows, np.int64)


def _hyper(sizes: Sizes, rng: np.random.Generator, args: dict[str, Any]) -> Array:
    return np.array([1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3, sizes["max_norm"]])


EMBEDDING_VALUES: dict[str, Values] = {
    "ids": lambda sizes, rng, args: rng.integers(0, sizes["V"], sizes["N"], np.int32),
    # no row uses the last position, so that its gradient must become 0
    "positions": lambda sizes, rng, args: rng.integers(0, sizes["T"] - 1, sizes["N"], np.int32),
}
EPSILON: dict[str, Values] = {"eps": lambda sizes, rng, args: EPS}
NUM_HEADS: dict[str, Values] = {"num_heads": lambda sizes, rng, args: sizes["NH"]}
ACC: tuple[Sizes, ...] = ({"acc": False}, {"acc": True})


def _rows(letters: str, *rows: tuple[int, ...]) -> tuple[Sizes, ...]:
    return tuple(dict(zip(letters.split(), row, strict=True)) for row in rows)


# uneven sizes around the blocks of 16, 32 and 64 that kernels work in, and single rows and columns
EMBEDDING_SIZES = _rows("V T N C", (5, 3, 7, 1), (11, 8, 16, 66), (50, 40, 333, 96))
NORM_SIZES = _rows("N C", (1, 3), (5, 17), (33, 64), (70, 200))
LINEAR_SIZES = _rows("N I O", (1, 1, 1), (1, 24, 40), (7, 5, 13), (64, 48, 130), (130, 96, 33), (6, 96, 35))
# the last has several chunks of rows
HEAD_SIZES = _rows("N C V Vp", (1, 3, 5, 8), (9, 17, 100, 128), (300, 24, 250, 256), (4100, 3, 5, 8))
FLAT_SIZES = _rows("P", (1,), (1000,), (40_000,), (300_001,))
ATTENTION_SIZES = _rows(
    "B T NH HS",
    (1, 1, 2, 8), (1, 2, 2, 8), (2, 31, 3, 1), (1, 33, 2, 8), (1, 64, 2, 8), (1, 70, 1, 16), (1, 100, 2, 8),
    (2, 65, 2, 64), (1, 40, 2, 80), (1, 257, 2, 8),
)  # fmt: skip
CACHED_SIZES = _rows(
    "S T NH HS Tmax",
    (1, 1, 2, 8, 4), (3, 1, 3, 16, 64), (2, 2, 1, 1, 33), (2, 5, 2, 64, 100), (3, 33, 2, 80, 100), (2, 70, 1, 8, 71),
)  # fmt: skip


def _embedding_uses(model: ModelSizes) -> dict[str, Sizes]:
    ids, positions = model.random_ids(), model.positions()
    return {"": {"V": model.Vp, "T": model.max_seq_len, "ids": ids, "positions": positions}}


def _cached_uses(model: ModelSizes) -> dict[str, Sizes]:
    return {"": {"T": 1, "Tmax": model.T, "lengths": np.full(model.B, model.T - 1, np.int32)}}


def _head_loss_uses(model: ModelSizes) -> dict[str, Sizes]:
    targets = model.random_ids()
    return {"": {"targets": targets, "dx": None, "dw": None, "dloss": 0.0}, "gradient": {"targets": targets}}


def adamw_use(parameters: int) -> Sizes:
    """Return the use of ``adamw`` with weight decay and clipping on all ``parameters``."""
    return {
        "P": parameters,
        "segments": np.array([[0, parameters, 1]]),
        "hyper": np.array([1e-4, 0.9, 0.95, 1e-8, 0.1, 0.1, 0.05, 1.0]),
        "sumsq": np.array([float(parameters)]),
    }


OPERATIONS = {
    "embedding_forward": Operation(
        "x:act[N,C] wte:real[V,C] wpe:real[T,C] ids:int32[N] positions:int32[N]",
        {"x": 1e-7}, _embedding_forward, EMBEDDING_SIZES, uses=_embedding_uses, values=EMBEDDING_VALUES,
    ),
    "embedding_backward": Operation(
        "dwte:real[V,C] dwpe:real[T,C] dx:act[N,C] ids:int32[N] positions:int32[N] acc",
        {"dwte": 1e-6, "dwpe": 1e-6}, _embedding_backward, EMBEDDING_SIZES, ACC, _embedding_uses, EMBEDDING_VALUES,
        accumulated=("dwpe",), updated=("dwte",),
    ),
    "residual_norm_forward": Operation(
        "res:act[N,C] y:act[N,C] mean:real[N] rstd:real[N] "
        "x:act[N,C] delta:act[N,C] bias:real[C] w:real[C] b:real[C] eps",
        {"res": 2e-7, "y": 2e-6, "mean": 1e-6, "rstd": 1e-6}, _residual_norm_forward, NORM_SIZES,
        ({}, {"bias": None}, {"delta": None, "bias": None, "res": None}),
        values=EPSILON,
        normal={"res": (2.0, 3.0), "delta": (2.0, 1.0)},  # a nonzero mean, to detect cancellation in the variance
        defaults={"res": "x"},
    ),
    "residual_norm_backward": Operation(
        "dx:act[N,C] dw:real[C] db:real[C] "
        "dy:act[N,C] res:act[N,C] mean:real[N] rstd:real[N] w:real[C] dres:act[N,C] acc",
        {"dx": 2e-6, "dw": 2e-6, "db": 2e-6}, _residual_norm_backward, NORM_SIZES,
        (*ACC, {"acc": True, "dres": None}),
        lambda model: {"": {"dres": "dx"}},
        normal={"res": (2.0, 3.0)},
        accumulated=("dw", "db"), prepare=_norm_statistics, forward_results=("mean", "rstd"),
    ),
    "linear_forward": Operation(
        "y:act[N,O] x:act[N,I] w:weight[O,I] b:real[O]",
        {"y": 2e-6}, _linear_forward, LINEAR_SIZES, ({}, {"b": None}),
        lambda model: {
            "qkv": {"I": model.C, "O": 3 * model.C},
            "attproj": {"I": model.C, "O": model.C, "b": None},  # the next residual_norm_forward adds the bias
            "fcproj": {"I": 4 * model.C, "O": model.C, "b": None},
        },
        matmul_outputs=("y",),
    ),
    "linear_backward": Operation(
        "dx:act[N,I] dw:real[O,I] db:real[O] dy:act[N,O] x:act[N,I] w:weight[O,I] acc",
        {"dx": 2e-6, "dw": 2e-6, "db": 2e-6}, _linear_backward, LINEAR_SIZES,
        (*ACC, {"acc": False, "db": None}, {"acc": True, "dx": None}),
        lambda model: {
            "qkv": {"I": model.C, "O": 3 * model.C},
            "attproj": {"I": model.C, "O": model.C},
            "fc": {"I": model.C, "O": 4 * model.C},
        },
        accumulated=("dw", "db"), matmul_outputs=("dx", "dw"),
    ),
    "linear_gelu_forward": Operation(
        "act:act[N,O] pre:act[N,O] x:act[N,I] w:weight[O,I] b:real[O]",
        {"act": 2e-6, "pre": 2e-6}, _linear_gelu_forward, LINEAR_SIZES,
        uses=lambda model: {"fc": {"I": model.C, "O": 4 * model.C}},
        normal={"pre": (0.0, 3.0)}, matmul_outputs=("act", "pre"),
    ),
    "gelu_forward": Operation(
        "act:act[N,O] pre:act[N,O]", {"act": 2e-6}, _gelu_forward, LINEAR_SIZES,
        uses=lambda model: {"": {"O": 4 * model.C}}, normal={"pre": (0.0, 3.0)},
    ),
    "gelu_linear_backward": Operation(
        "dpre:act[N,I] dw:real[O,I] db:real[O] dy:act[N,O] act:act[N,I] pre:act[N,I] w:weight[O,I] acc",
        {"dpre": 2e-6, "dw": 2e-6, "db": 2e-6}, _gelu_linear_backward, LINEAR_SIZES, ACC,
        lambda model: {"fcproj": {"I": 4 * model.C, "O": model.C}},
        normal={"pre": (0.0, 3.0)}, accumulated=("dw", "db"), matmul_outputs=("dpre", "dw"),
    ),
    "attention_forward": Operation(
        "out:act[B,T,C] lse:real[B,NH,T] qkv:act[B,T,3C] num_heads",
        {"out": 2e-6, "lse": 1e-6}, _attention_forward, ATTENTION_SIZES,
        values=NUM_HEADS, normal={"qkv": (0.0, 1.5)}, bf16_bound=ATTENTION_BF16_BOUND,
    ),
    "attention_backward": Operation(
        "dqkv:act[B,T,3C] dout:act[B,T,C] out:act[B,T,C] lse:real[B,NH,T] qkv:act[B,T,3C] num_heads",
        {"dqkv": 5e-6}, _attention_backward, ATTENTION_SIZES,
        values=NUM_HEADS, normal={"qkv": (0.0, 1.5)}, bf16_bound=ATTENTION_BF16_BOUND,
        prepare=_attention_results, forward_results=("out", "lse"),
    ),
    "attention_cached": Operation(
        "out:act[S,T,C] keys:act[S,NH,Tmax,HS] values:act[S,NH,Tmax,HS] qkv:act[S,T,3C] lengths:int32[S] num_heads",
        {"out": 2e-6, "keys": 0.0, "values": 0.0}, _attention_cached, CACHED_SIZES, uses=_cached_uses,
        values={"lengths": _cache_lengths, **NUM_HEADS}, normal={"qkv": (0.0, 1.5)},
        updated=("keys", "values"), host_arguments=("lengths",),
    ),
    "head_loss": Operation(
        "losses:real[N] dx:act[N,C] dw:real[Vp,C] x:act[N,C] w:weight[Vp,C] targets:int32[N] vocab_size dloss acc",
        {"losses": 1e-6, "dx": 5e-6, "dw": 5e-6}, _head_loss, HEAD_SIZES,
        (*ACC, {"acc": False, "dx": None, "dw": None}), _head_loss_uses,
        values={
            "targets": _random_targets,
            "vocab_size": lambda sizes, rng, args: sizes["V"],
            "dloss": lambda sizes, rng, args: 1.0 / sizes["N"],
        },
        accumulated=("dw",), matmul_outputs=("losses", "dx", "dw"),
    ),
    "head_logits": Operation(
        "logits:real[N,V] x:act[N,C] w:weight[Vp,C]", {"logits": 2e-6}, _head_logits, HEAD_SIZES,
        uses=lambda model: {"": {"N": model.B}}, matmul_outputs=("logits",),
    ),
    "sum_squares": Operation("out:float64[1] g:real[P]", {"out": 1e-12}, _sum_squares, FLAT_SIZES),
    "adamw": Operation(
        "master:real[P] m:real[P] v:real[P] g:real[P] segments:int64[K,3] hyper:float64[8] sumsq:float64[1]",
        {"master": 5e-7, "m": 1e-6, "v": 1e-6}, _adamw, FLAT_SIZES,
        ({"max_norm": 0.0}, {"max_norm": 0.3}, {"max_norm": 1e9}),
        lambda model: {"": adamw_use(model.parameters)},
        values={
            "segments": _segments,
            "hyper": _hyper,
            "sumsq": lambda sizes, rng, args: np.array([np.dot(args["g"], args["g"])]),
        },
        normal={"m": (0.0, 0.1)}, squared=("v",), updated=("master", "m", "v"),
    ),
}  # fmt: skip


def call_cost(kernels: Kernels, name: str, arguments: tuple[Any, ...]) -> Cost:
    """Return the cost of a call with a backend's arrays; downloads those whose elements it depends on."""
    operation = OPERATIONS[name]
    pairs = zip(operation.arguments, arguments, strict=True)
    host = operation.host_arguments
    return operation.cost(*(kernels.download(each) if argument.name in host else each for argument, each in pairs))


def model_uses(model: ModelSizes) -> Iterator[tuple[str, str, Sizes]]:
    """Yield each operation's name, its use's name with the operation's ("linear_forward qkv"), and the sizes."""
    for name, operation in OPERATIONS.items():
        for use, sizes in operation.uses(model).items():
            yield name, f"{name} {use}".strip(), model.axes() | sizes
