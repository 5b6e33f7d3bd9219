"""What each operation of ``kernels.spec`` costs at least: its arithmetic, and the bytes that must come and go.

Bytes count each array once, read or written (twice where it is both), whatever the caches do. Arithmetic counts a
multiplication or addition as one; of matrix products it is exact, of the rest about right, and never what decides.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llmc_cli.kernels.spec import Array, Kernels


class Cost(NamedTuple):
    flops: int
    bytes: int


NO_COST = Cost(0, 0)


def size(*arrays: Array | None) -> int:
    """Bytes of the arrays that are there."""
    return sum(array.nbytes for array in arrays if array is not None)


def embedding_forward(x: Array, wte: Array, wpe: Array, ids: Array, positions: Array) -> Cost:
    return Cost(x.size, 3 * size(x) + size(ids, positions))  # a row of each table for each row of x


def embedding_backward(dwte: Array, dwpe: Array, dx: Array, ids: Array, positions: Array, acc: bool) -> Cost:
    return Cost(2 * dx.size, 3 * size(dx) + (1 + acc) * size(dwpe) + size(ids, positions))


def residual_norm_forward(
    res: Array, y: Array, mean: Array, rstd: Array,
    x: Array, delta: Array | None, bias: Array | None, w: Array, b: Array, eps: float,
) -> Cost:  # fmt: skip
    sums = size(res, delta, bias) if delta is not None else 0
    return Cost(9 * y.size, size(y, mean, rstd, x, w, b) + sums)


def residual_norm_backward(
    dx: Array, dw: Array, db: Array,
    dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None, acc: bool,
) -> Cost:  # fmt: skip
    return Cost(15 * dx.size, size(dx, dy, res, mean, rstd, w, dres) + (1 + acc) * size(dw, db))


def linear_forward(y: Array, x: Array, w: Any, b: Array | None) -> Cost:
    (N, O), I = y.shape, x.shape[1]  # noqa: E741
    return Cost(2 * N * O * I, size(y, x, b) + O * I * x.itemsize)


def linear_backward(dx: Array | None, dw: Array, db: Array | None, dy: Array, x: Array, w: Any, acc: bool) -> Cost:
    product = 2 * dy.size * x.shape[1]
    read_weight = dy.shape[1] * x.shape[1] * x.itemsize if dx is not None else 0
    return Cost(product * (1 if dx is None else 2), size(dx, dy, x) + read_weight + (1 + acc) * size(dw, db))


def linear_gelu_forward(act: Array, pre: Array, x: Array, w: Any, b: Array) -> Cost:
    flops, moved = linear_forward(pre, x, w, b)
    return Cost(flops + 10 * pre.size, moved + size(act))


def gelu_forward(act: Array, pre: Array) -> Cost:
    return Cost(10 * pre.size, size(act, pre))


def gelu_linear_backward(
    dpre: Array, dw: Array, db: Array, dy: Array, act: Array, pre: Array, w: Any, acc: bool
) -> Cost:
    flops, moved = linear_backward(dpre, dw, db, dy, act, w, acc)
    return Cost(flops + 20 * pre.size, moved + size(pre))


def attention_forward(out: Array, lse: Array, qkv: Array, num_heads: int) -> Cost:
    B, T, C = out.shape
    return Cost(2 * _causal_product(B, T, C), size(out, lse, qkv))


def attention_backward(dqkv: Array, dout: Array, out: Array, lse: Array, qkv: Array, num_heads: int) -> Cost:
    B, T, C = out.shape  # five products: the scores once more, dv, the scores' gradient, dq, dk
    return Cost(5 * _causal_product(B, T, C), size(dqkv, dout, out, lse, qkv))


def _causal_product(B: int, T: int, C: int) -> int:
    """FLOPs of one product over the lower triangle of (T,T), all heads together."""
    return B * T * (T + 1) * C


def attention_cached(out: Array, keys: Array, values: Array, qkv: Array, lengths: Array, num_heads: int) -> Cost:
    S, T, C = out.shape
    held = int(lengths.sum())  # positions in the caches, all sequences together; lengths are on the host here
    pairs = T * held + S * T * (T + 1) // 2
    return Cost(4 * pairs * C, size(out, qkv) + 2 * (held + S * T) * C * keys.itemsize)


def head_loss(
    losses: Array, dx: Array | None, dw: Array | None,
    x: Array, w: Any, targets: Array, vocab_size: int, dloss: float, acc: bool,
) -> Cost:  # fmt: skip
    products = 1 + (dx is not None) + (dw is not None)
    weight = vocab_size * x.shape[1] * x.itemsize
    return Cost(2 * products * x.size * vocab_size, size(losses, dx, x, targets) + weight + (1 + acc) * size(dw))


def head_logits(logits: Array, x: Array, w: Any) -> Cost:
    return linear_forward(logits, x, w, None)


def sum_squares(out: Array, g: Array) -> Cost:
    return Cost(2 * g.size, size(g))


def adamw(master: Array, m: Array, v: Array, g: Array, segments: Array, hyper: Array, sumsq: Array) -> Cost:
    return Cost(14 * g.size, 2 * size(master, m, v) + size(g))


COSTS: dict[str, Callable[..., Cost]] = {
    function.__name__: function
    for function in (
        embedding_forward, embedding_backward, residual_norm_forward, residual_norm_backward, linear_forward,
        linear_backward, linear_gelu_forward, gelu_forward, gelu_linear_backward, attention_forward, attention_backward,
        attention_cached, head_loss, head_logits, sum_squares, adamw,
    )
}  # fmt: skip
"""Per operation a function of the operation's own arguments."""


def cost(kernels: Kernels, name: str, arguments: tuple[Any, ...]) -> Cost:
    """Of one call; the numbers that a cost depends on are brought to the host."""
    if name == "attention_cached":
        *arrays, lengths, num_heads = arguments
        arguments = (*arrays, kernels.download(lengths), num_heads)
    return COSTS[name](*arguments)
