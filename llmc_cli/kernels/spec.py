"""The operations that a backend offers, one signature each.

Letters: B sequences, T positions, N = B·T rows, C channels, NH heads, HS = C/NH head size, F hidden width,
V vocabulary, Vp its padded size, S sequences in a cache. Outputs come first, then inputs, then options. Every array is
C-contiguous and lies where the backend computes. Token ids and positions are int32. Activations, their gradients, keys
and values are of the backend's ``activation_dtype``; parameters, their gradients and moments, means, rstd, lse, losses
and logits of its ``dtype``: float64 in the reference, float32 elsewhere. An operation allocates nothing once warm,
prints nothing and knows nothing of models. Each docstring says per output whether it is *overwritten* or *added to*;
``acc`` switches the outputs it names from the first to the second. Outputs must not overlap inputs unless a docstring
allows it.

The names, signatures and their order are the same in every backend; a test compares them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = Any
"""A backend's own array: numpy.ndarray on the CPU. Of others the engine takes shapes, slices of leading axes and
``reshape`` only; ``upload`` and ``download`` are the way to their numbers."""

Weight: TypeAlias = Any
"""A matrix (out, in) in the form a backend likes best, made by ``bind``; opaque to its callers."""

HYPER = ("lr", "beta1", "beta2", "eps", "decay", "correction1", "correction2", "max_norm")
"""Slots of ``adamw``'s ``hyper``: correction1 = 1 - beta1^t, correction2 = 1 - beta2^t; max_norm 0: no clipping."""


class Runtime(Protocol):
    """Memory, transfers and weights of one backend. Its scratch memory grows to the largest call and is then kept."""

    name: str
    device_name: str  # the GPU's name; empty on the CPU
    dtype: Any
    activation_dtype: Any

    def alloc(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A zeroed array whose first element is aligned to 64 bytes."""
        ...

    def upload(self, array: Array, values: "NDArray[Any]") -> None:
        """Overwrite ``array`` with values of its shape from the host, converted to its dtype. Where these are what
        ``download`` gave, nothing is left to do on a backend whose memory is the host's."""
        ...

    def upload_ahead(self, array: Array, values: "NDArray[Any]") -> None:
        """As ``upload``, of a few numbers, behind all that has been asked for so far: they may be on their way while
        that runs."""
        ...

    def download(self, array: Array) -> "NDArray[Any]":
        """The numbers of ``array`` on the host, bfloat16 as float32: the array itself where it lies there, else a
        copy, made after everything that has been asked for is done."""
        ...

    def copy(self, target: Array, source: Array) -> None:
        """Overwrite ``target`` with ``source``, of the same shape and dtype."""
        ...

    def synchronize(self) -> None:
        """Wait until everything that has been asked for is done."""
        ...

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work``, to be called again and again in the place of it: the same operations and copies, on the same arrays
        and with the same numbers each time; what differs are the contents. A GPU may take it as one launch then."""
        ...

    def launch_count(self) -> int:
        """Return the number of GPU launches so far: kernels, matrix products and graphs of them. 0 on the CPU."""
        ...

    def held_bytes(self) -> int:
        """Return the bytes of GPU memory held, including freed blocks kept for later arrays. 0 on the CPU."""
        ...

    def release_memory(self) -> None:
        """Return freed blocks of GPU memory to the device. Does nothing on the CPU."""
        ...

    def workspace_bytes(self, B: int, T: int, channels: int, num_heads: int, padded_vocab_size: int) -> int:
        """Bytes of scratch memory that training steps of this size come to, without allocating any."""
        ...

    def bound_bytes(self, numbers: int) -> int:
        """Bytes that ``bind`` allocates for weights of so many numbers."""
        ...

    def bind(self, master: Array) -> Weight:
        """The weight whose values are ``master`` (out, in), a view that the caller keeps and updates."""
        ...

    def publish(self, weights: list[Weight]) -> None:
        """Tell the backend that the masters of ``weights`` have changed."""
        ...


class Kernels(Runtime, Protocol):
    """The operations of one backend, each with an entry in the table of ``operations``."""

    def embedding_forward(self, x: Array, wte: Array, wpe: Array, ids: Array, positions: Array) -> None:
        """x (N,C) = wte (Vp,C)[ids (N,)] + wpe (T,C)[positions (N,)]; x overwritten."""
        ...

    def embedding_backward(self, dwte: Array, dwpe: Array, dx: Array, ids: Array, positions: Array, acc: bool) -> None:
        """dwte (Vp,C)[ids] += dx (N,C), always added to, since the tied head has written it before; dwpe (T,C) the
        same by position, overwritten (rows that no position names become 0), or added to with ``acc``."""
        ...

    def residual_norm_forward(
        self, res: Array, y: Array, mean: Array, rstd: Array,
        x: Array, delta: Array | None, bias: Array | None, w: Array, b: Array, eps: float,
    ) -> None:  # fmt: skip
        """res (N,C) = x (N,C) + delta (N,C) + bias (C,), then y (N,C) = (res - mean) · rstd · w (C,) + b (C,) with each
        row's mean (N,) and rstd (N,) = 1/sqrt(variance + eps), the population variance. bias is that of the product
        that gave delta, added here since this reads delta anyway. res may be x itself; without delta, and then without
        bias, it is not written, and x is what is normalized. All outputs overwritten. Layer normalization: Ba et al.
        2016, arXiv:1607.06450."""
        ...

    def residual_norm_backward(
        self, dx: Array, dw: Array, db: Array,
        dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None, acc: bool,
    ) -> None:  # fmt: skip
        """dx (N,C) = dres (N,C, the gradient that reaches ``res`` past the norm; absent: 0) + the norm's gradient of dy
        (N,C). dx is the gradient of both x and delta, and its sum over rows that of bias; it is overwritten and may be
        dres or dy itself. dw (C,), db (C,) overwritten, or added to with ``acc``."""
        ...

    def linear_forward(self, y: Array, x: Array, w: Weight, b: Array | None) -> None:
        """y (N,O) = x (N,I) · w (O,I)ᵀ + b (O,); y overwritten."""
        ...

    def linear_backward(
        self, dx: Array | None, dw: Array, db: Array | None, dy: Array, x: Array, w: Weight, acc: bool
    ) -> None:
        """dx (N,I) = dy (N,O) · w (O,I), overwritten; dw (O,I) = dyᵀ · x, db (O,) = the sum of dy over rows, both
        overwritten, or added to with ``acc``."""
        ...

    def linear_gelu_forward(self, act: Array, pre: Array, x: Array, w: Weight, b: Array) -> None:
        """pre (N,F) = x (N,C) · w (F,C)ᵀ + b (F,); act (N,F) = gelu(pre) in the tanh form (Hendrycks and Gimpel 2016,
        arXiv:1606.08415). Both overwritten."""
        ...

    def gelu_forward(self, act: Array, pre: Array) -> None:
        """act (N,F) = gelu(pre (N,F)), the same bits as ``linear_gelu_forward`` gave; overwritten."""
        ...

    def gelu_linear_backward(
        self, dpre: Array, dw: Array, db: Array, dy: Array, act: Array, pre: Array, w: Weight, acc: bool
    ) -> None:
        """Back through y = act · wᵀ + b, act = gelu(pre), with w (C,F) the projection *behind* the activation:
        dpre (N,F) = (dy (N,C) · w) · gelu'(pre), overwritten; dw (C,F) = dyᵀ · act, db (C,) = the sum of dy over rows,
        both overwritten, or added to with ``acc``. dpre may be act, which is not needed behind this."""
        ...

    def attention_forward(self, out: Array, lse: Array, qkv: Array, num_heads: int) -> None:
        """Causal attention: out (B,T,C), lse (B,NH,T) from qkv (B,T,3C), whose last axis is q, k, v, each by head.
        out = softmax(q·kᵀ/sqrt(HS)) · v over the positions up to one's own; lse = log of the sum of the exponentials
        of the scaled scores, kept for the backward pass. No (T,T) matrix is stored (Dao et al. 2022,
        arXiv:2205.14135). Both overwritten."""
        ...

    def attention_backward(self, dqkv: Array, dout: Array, out: Array, lse: Array, qkv: Array, num_heads: int) -> None:
        """dqkv (B,T,3C) from dout (B,T,C) and what forward left, scores recomputed; overwritten. It may be qkv."""
        ...

    def attention_cached(
        self, out: Array, keys: Array, values: Array, qkv: Array, lengths: Array, num_heads: int
    ) -> None:
        """Causal attention of T new positions per sequence behind those already in the cache.

        qkv (S,T,3C) holds the new positions; keys and values (S,NH,Tmax,HS) hold lengths (S,) int32 earlier ones and
        take the new ones behind them (written in place; the rest is left as it is; the caller advances lengths).
        Position t of sequence s attends to its lengths[s] + t + 1 first keys. out (S,T,C) overwritten. Serves prompts
        (T > 1) and single tokens (T = 1).
        """
        ...

    def head_loss(
        self, losses: Array, dx: Array | None, dw: Array | None,
        x: Array, w: Weight, targets: Array, vocab_size: int, dloss: float, acc: bool,
    ) -> None:  # fmt: skip
        """Cross-entropy of logits = x (N,C) · w (Vp,C)ᵀ over the first V = vocab_size rows of w, and its gradient.

        losses (N,) = the loss of each row, 0 where targets (N,) int32 is -1 (ignored); overwritten. dx (N,C) =
        dloss · the gradient of the sum of the losses, overwritten; dw (Vp,C) likewise, overwritten (padding rows
        become 0), or added to with ``acc``. Both absent: the loss only. Works through chunks of rows, so that the whole
        logits need not exist; softmax and its gradient replace the logits in place.
        """
        ...

    def head_logits(self, logits: Array, x: Array, w: Weight) -> None:
        """logits (R,V) = x (R,C) · w (Vp,C)ᵀ, the first V columns, V taken from logits; overwritten."""
        ...

    def sum_squares(self, out: Array, g: Array) -> None:
        """out (1,) float64 = the sum of the squares of g (P,), added up in double precision in an order that does not
        depend on the number of threads; overwritten."""
        ...

    def adamw(self, master: Array, m: Array, v: Array, g: Array, segments: Array, hyper: Array, sumsq: Array) -> None:
        """One AdamW update in place of master, m, v (P,) (Loshchilov and Hutter 2019, arXiv:1711.05101).

        g (P,) is scaled by min(1, max_norm / sqrt(sumsq[0])) first (sumsq (1,) float64 as ``sum_squares`` gives it).
        segments (K,3) int64 rows are offset, length, decay (0 or 1): they cover the P elements. hyper (8,) float64 as
        ``HYPER`` names it. m = beta1·m + (1-beta1)·g; v = beta2·v + (1-beta2)·g²;
        master -= lr · (m/correction1 / (sqrt(v/correction2) + eps) + decay · master). g is left as it is.
        """
        ...
