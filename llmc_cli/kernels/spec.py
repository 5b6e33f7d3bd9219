"""The interface of a backend: its memory (``Runtime``) and its operations (``Kernels``).

Axes: B sequences, T positions, N = B·T rows, C channels, NH heads, HS = C/NH head size, I and O input and output width
of a linear layer, F hidden width of the MLP, V vocabulary size, Vp padded vocabulary size, S sequences in a cache of
Tmax positions, P parameters.

Arguments come in the order outputs, inputs, options. Every array is C-contiguous and resides in the backend's memory.
Token ids and positions are int32. Activations, their gradients, keys and values have the backend's
``activation_dtype``. Parameters, their gradients and moments, mean, rstd, lse, losses and logits have its ``dtype``:
float64 in the reference, float32 elsewhere.

Each docstring says whether an output is *overwritten* or *accumulated* (added to). With ``acc`` the outputs that it
names are accumulated instead of overwritten. Outputs must not overlap inputs unless a docstring allows it. After the
first call with given shapes an operation allocates nothing. Operations may run asynchronously, in the order of the
calls, until ``synchronize`` or ``download``.

Every backend has the same names, signatures and order; a test compares them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from numpy.typing import NDArray

Array: TypeAlias = Any
"""A backend's array: numpy.ndarray on the CPU. Code outside the backend uses only its shape, slices of leading axes and
``reshape``, and accesses elements through ``upload`` and ``download``."""

Weight: TypeAlias = Any
"""An opaque handle of a matrix (O,I), returned by ``bind``; it may hold a copy in another layout or precision."""

HYPER = ("lr", "beta1", "beta2", "eps", "decay", "correction1", "correction2", "max_norm")
"""Elements of ``hyper`` in ``adamw``: correction1 = 1 - beta1^t, correction2 = 1 - beta2^t at step t; max_norm 0
disables clipping."""


class Runtime(Protocol):
    """Memory, transfers and weights of one backend. Scratch memory grows to the largest call and is then kept."""

    name: str
    device_name: str  # the GPU's name; empty on the CPU
    dtype: Any
    activation_dtype: Any

    def alloc(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return a zeroed array, aligned to 64 bytes."""
        ...

    def upload(self, array: Array, values: "NDArray[Any]") -> None:
        """Overwrite ``array`` with host values of the same shape, converted to its dtype.

        If the backend's memory is the host's and ``values`` is the array itself, as ``download`` returned it, this does
        nothing.
        """
        ...

    def upload_async(self, array: Array, values: "NDArray[Any]") -> None:
        """Overwrite a small ``array`` with host values after all calls so far; the transfer may overlap with them."""
        ...

    def download(self, array: Array) -> "NDArray[Any]":
        """Return the elements of ``array`` on the host after all calls so far, bfloat16 as float32.

        If the backend's memory is the host's, this is the array itself; otherwise a copy.
        """
        ...

    def copy(self, target: Array, source: Array) -> None:
        """Overwrite ``target`` with ``source``, which has the same shape and dtype."""
        ...

    def synchronize(self) -> None:
        """Wait until all calls so far have completed."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a replayable version of ``work`` (a CUDA graph on GPUs).

        ``work`` must call the same operations and copies with the same arrays and numbers each time; only the contents
        of the arrays may change. It must neither upload nor download.
        """
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
        """Return the bytes of scratch memory that training steps of this size need, without allocating it."""
        ...

    def bind_bytes(self, numbers: int) -> int:
        """Return the bytes that ``bind`` allocates for weights of ``numbers`` elements in total."""
        ...

    def bind(self, master: Array) -> Weight:
        """Return a ``Weight`` for ``master`` (O,I), the matrix in ``dtype`` that the caller owns and updates; see
        ``publish``."""
        ...

    def publish(self, weights: list[Weight]) -> None:
        """Convert the master matrices of ``weights`` to the form that products read.

        Must be called after every change of a master.
        """
        ...


class Kernels(Runtime, Protocol):
    """The operations of one backend, each with an entry in the table of ``operations``."""

    def embedding_forward(self, x: Array, wte: Array, wpe: Array, ids: Array, positions: Array) -> None:
        """x (N,C) = wte (Vp,C)[ids (N,)] + wpe (T,C)[positions (N,)].

        x is overwritten.
        """
        ...

    def embedding_backward(self, dwte: Array, dwpe: Array, dx: Array, ids: Array, positions: Array, acc: bool) -> None:
        """dwte (Vp,C)[ids (N,)] += dx (N,C); dwpe (T,C)[positions (N,)] += dx.

        dwte is always accumulated, since the tied output head has written it before. dwpe is overwritten (rows of no
        position become 0), or accumulated with ``acc``.
        """
        ...

    def residual_norm_forward(
        self, res: Array, y: Array, mean: Array, rstd: Array,
        x: Array, delta: Array | None, bias: Array | None, w: Array, b: Array, eps: float,
    ) -> None:  # fmt: skip
        """Residual addition and layer normalization (Ba et al. 2016, arXiv:1607.06450).

        res (N,C) = x (N,C) + delta (N,C) + bias (C,); y (N,C) = (res - mean) · rstd · w (C,) + b (C,), where mean (N,)
        is the mean of each row and rstd (N,) = 1/sqrt(population variance + eps). bias is that of the matrix product
        that computed delta, added here because delta is read here anyway.

        All outputs are overwritten. res may be x. Without delta there must be no bias; x is then normalized and res is
        not written.
        """
        ...

    def residual_norm_backward(
        self, dx: Array, dw: Array, db: Array,
        dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None, acc: bool,
    ) -> None:  # fmt: skip
        """dx (N,C) = dres (N,C) + the gradient of the norm at dy (N,C); dw (C,), db (C,) are those of its parameters.

        dres is the gradient of res from the residual stream; None is 0. dx is the gradient of both x and delta, and its
        sum over rows is that of bias. dx is overwritten and may be dres or dy. dw and db are overwritten, or
        accumulated with ``acc``.
        """
        ...

    def linear_forward(self, y: Array, x: Array, w: Weight, b: Array | None) -> None:
        """y (N,O) = x (N,I) · w (O,I)ᵀ + b (O,).

        y is overwritten.
        """
        ...

    def linear_backward(
        self, dx: Array | None, dw: Array, db: Array | None, dy: Array, x: Array, w: Weight, acc: bool
    ) -> None:
        """dx (N,I) = dy (N,O) · w (O,I); dw (O,I) = dyᵀ · x (N,I); db (O,) = the sum of dy over rows.

        dx is overwritten. dw and db are overwritten, or accumulated with ``acc``. dx and db are skipped if None.
        """
        ...

    def linear_gelu_forward(self, act: Array, pre: Array, x: Array, w: Weight, b: Array) -> None:
        """pre (N,F) = x (N,C) · w (F,C)ᵀ + b (F,); act (N,F) = gelu(pre).

        gelu is the tanh approximation (Hendrycks and Gimpel 2016, arXiv:1606.08415). Both outputs are overwritten.
        """
        ...

    def gelu_forward(self, act: Array, pre: Array) -> None:
        """act (N,F) = gelu(pre (N,F)), bit for bit as ``linear_gelu_forward`` computes it.

        act is overwritten.
        """
        ...

    def gelu_linear_backward(
        self, dpre: Array, dw: Array, db: Array, dy: Array, act: Array, pre: Array, w: Weight, acc: bool
    ) -> None:
        """The gradient of y (N,C) = act · w (C,F)ᵀ + b, where act (N,F) = gelu(pre (N,F)) is the layer's input.

        dpre (N,F) = (dy (N,C) · w) · gelu'(pre); dw (C,F) = dyᵀ · act; db (C,) = the sum of dy over rows. dpre is
        overwritten and may be act. dw and db are overwritten, or accumulated with ``acc``.
        """
        ...

    def attention_forward(self, out: Array, lse: Array, qkv: Array, num_heads: int) -> None:
        """Causal self-attention: out (B,T,C) = softmax(q·kᵀ/sqrt(HS)) · v for each head.

        The last axis of qkv (B,T,3C) is q, k and v, each of NH heads. A position attends to itself and those before it.
        lse (B,NH,T) = the logarithm of the sum of the exponentials of the scaled scores, for the backward pass. No
        (T,T) matrix is stored (Dao et al. 2022, arXiv:2205.14135). Both outputs are overwritten.
        """
        ...

    def attention_backward(self, dqkv: Array, dout: Array, out: Array, lse: Array, qkv: Array, num_heads: int) -> None:
        """dqkv (B,T,3C) from dout (B,T,C) and the arrays of ``attention_forward``; scores are recomputed.

        dqkv is overwritten and may be qkv.
        """
        ...

    def attention_cached(
        self, out: Array, keys: Array, values: Array, qkv: Array, lengths: Array, num_heads: int
    ) -> None:
        """Causal self-attention of T new positions per sequence with a cache; T > 1 for prompts, 1 for single tokens.

        keys and values (S,NH,Tmax,HS) hold the first lengths (S,) int32 positions of each sequence. The new keys and
        values in qkv (S,T,3C) are written after them; the rest of the cache is unchanged, and the caller advances
        lengths. Position t of sequence s attends to its first lengths[s] + t + 1 keys. out (S,T,C) is overwritten.
        """
        ...

    def head_loss(
        self, losses: Array, dx: Array | None, dw: Array | None,
        x: Array, w: Weight, targets: Array, vocab_size: int, dloss: float, acc: bool,
    ) -> None:  # fmt: skip
        """Cross-entropy of logits = x (N,C) · w (Vp,C)ᵀ over the first V = vocab_size rows of w, and its gradients.

        losses (N,) = the loss of each row, 0 where targets (N,) int32 is -1 (ignored). dx (N,C) and dw (Vp,C) are dloss
        times the gradients of the sum of the losses; if both are None, only losses is computed. losses and dx are
        overwritten. dw is overwritten (padding rows become 0), or accumulated with ``acc``. Rows are processed in
        chunks, so that the logits (N,V) need not exist as a whole; the gradient replaces the logits in place.
        """
        ...

    def head_logits(self, logits: Array, x: Array, w: Weight) -> None:
        """logits (N,V) = x (N,C) · w (Vp,C)ᵀ, restricted to the first V rows of w; V is taken from logits.

        logits is overwritten.
        """
        ...

    def sum_squares(self, out: Array, g: Array) -> None:
        """out (1,) float64 = the sum of the squares of g (P,).

        The sum is computed in double precision, in an order that does not depend on the number of threads. out is
        overwritten.
        """
        ...

    def adamw(self, master: Array, m: Array, v: Array, g: Array, segments: Array, hyper: Array, sumsq: Array) -> None:
        """One AdamW update of master, m and v (P,) in place (Loshchilov and Hutter 2019, arXiv:1711.05101).

        The gradient is g (P,) scaled by min(1, max_norm / sqrt(sumsq[0])), where sumsq (1,) float64 is the result of
        ``sum_squares``; the array itself is not changed. m = beta1·m + (1-beta1)·g; v = beta2·v + (1-beta2)·g²;
        master -= lr · (m/correction1 / (sqrt(v/correction2) + eps) + decay · master).

        hyper (8,) float64 holds the values named by ``HYPER``. Rows of segments (K,3) int64 are offset, length and
        whether decay applies (0 or 1); together they cover the P elements.
        """
        ...
