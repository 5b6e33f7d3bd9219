"""``spec.Kernels`` on a CUDA device: the launches of each operation and their scratch memory."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc_cli.kernels.cuda import attention, classifier, elementwise, embedding, few_rows, norm, optimizer
from llmc_cli.kernels.cuda.blas import Blas
from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.replay import Replayable
from llmc_cli.kernels.spec import Array

MAX_HEAD_ROWS = 4096
"""Maximum number of rows of logits at a time: 1.2 GB in bf16 for GPT-2's vocabulary. Half as many rows need twice as
many passes over the head's matrix and its gradient; twice as many rows halve the passes for another 1.2 GB."""


def head_rows(N: int) -> int:
    """Return the number of rows of logits to compute at a time for N rows: equal chunks, as few as
    ``MAX_HEAD_ROWS`` allows."""
    return -(-N // -(-N // MAX_HEAD_ROWS))


@dataclass(frozen=True)
class RoundedWeight:
    """A matrix (out, in) for bf16 products: ``rows`` holds the bits of ``master`` rounded to bf16."""

    master: Array
    rows: Array


CudaWeight: TypeAlias = Any
"""A ``RoundedWeight`` in bf16, otherwise the master itself."""


class CudaKernels:
    """The kernels in ``precision``: fp32, tf32 or bf16. In bf16, activations are stored and multiplied in bf16 and
    summed in float32; parameters, their gradients, statistics and logits are float32.

    Everything runs in order on one stream, except prefetched uploads. Scratch arrays are named, grow to the largest
    call and are never freed.
    """

    name: str = "cuda"
    device_name: str
    dtype: Any = np.float32
    activation_dtype: Any

    def __init__(self, device: Device, precision: str) -> None:
        self.device, self.precision = device, precision
        self.device_name, self.activation_dtype = device.name, device.real
        self.matmul = Blas(device, precision)
        self._scratch: dict[str, Array] = {}
        self._published: tuple[tuple[int, int, int], ...] = ()

    def alloc(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return self.device.alloc(shape, dtype)

    def upload(self, array: Array, values: NDArray[Any]) -> None:
        self.device.upload(array, values)

    def upload_async(self, array: Array, values: NDArray[Any]) -> None:
        self.device.upload_async(array, values)

    def download(self, array: Array) -> NDArray[Any]:
        return self.device.download(array)

    def copy(self, target: Array, source: Array) -> None:
        self.device.copy(target, source)

    def synchronize(self) -> None:
        self.device.synchronize()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return Replayable(self.device, work)

    def launch_count(self) -> int:
        return self.device.launches

    def held_bytes(self) -> int:
        return self.device.held_bytes()

    def release_memory(self) -> None:
        self.device.release()

    def scratch(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """Return uninitialized memory, which the next call with the same name may reuse."""
        size = math.prod(shape)
        flat = self._scratch.get(name)
        if flat is None or flat.size < size:
            self._scratch.pop(name, None)
            flat = self._scratch[name] = self.alloc((size,), dtype)
        return flat[:size].reshape(shape)

    def workspace_bytes(self, B: int, T: int, channels: int, num_heads: int, padded_vocab_size: int) -> int:
        N, C, rows = B * T, channels, head_rows(B * T)
        real: int = np.dtype(self.activation_dtype).itemsize
        logits = rows * padded_vocab_size * (4 if real == 4 else 4 + real)
        columns = max(norm.column_parts(N) * 4 * C, 2 * norm.norm_parts(N) * C)
        attention_floats = attention.backward_scratch(B, T, num_heads, C // num_heads)
        scratch = logits + 4 * columns + 4 * attention_floats + N * C * real + 8 * optimizer.MAX_SQUARE_PARTS
        return scratch + self.matmul.workspace_bytes

    def bind_bytes(self, numbers: int) -> int:
        return 2 * numbers if self.precision == "bf16" else 0

    def bind(self, master: Array) -> CudaWeight:
        if self.precision != "bf16":
            return master
        return RoundedWeight(master, self.alloc(master.shape, np.uint16))

    def publish(self, weights: list[CudaWeight]) -> None:
        if self.precision != "bf16":
            return
        rows = tuple((weight.master.data.ptr, weight.rows.data.ptr, weight.master.size) for weight in weights)
        if rows != self._published:
            self._published, self._table = rows, self.alloc((len(rows), 3), np.int64)
            self.upload(self._table, np.array(rows, np.int64))
        elementwise.round_weights(self.device, self._table)

    def _rows(self, weight: CudaWeight) -> Array:
        return weight.rows if self.precision == "bf16" else weight

    def embedding_forward(self, x: Array, wte: Array, wpe: Array, ids: Array, positions: Array) -> None:
        embedding.embedding_forward(self.device, x, wte, wpe, ids, positions)

    def embedding_backward(self, dwte: Array, dwpe: Array, dx: Array, ids: Array, positions: Array, acc: bool) -> None:
        embedding.embedding_backward(self.device, dwte, dx, ids)
        embedding.position_backward(self.device, dwpe, dx, positions, acc)

    def residual_norm_forward(
        self, res: Array, y: Array, mean: Array, rstd: Array,
        x: Array, delta: Array | None, bias: Array | None, w: Array, b: Array, eps: float,
    ) -> None:  # fmt: skip
        norm.residual_norm_forward(self.device, res, y, mean, rstd, x, delta, bias, w, b, eps)

    def residual_norm_backward(
        self, dx: Array, dw: Array, db: Array,
        dy: Array, res: Array, mean: Array, rstd: Array, w: Array, dres: Array | None, acc: bool,
    ) -> None:  # fmt: skip
        N, C = dx.shape
        parts = self.scratch("parts", (2, norm.norm_parts(N), C))
        norm.norm_backward(self.device, dx, parts, dy, res, mean, rstd, w, dres)
        norm.sum_partials(self.device, (dw, db), parts, acc)

    def linear_forward(self, y: Array, x: Array, w: CudaWeight, b: Array | None) -> None:
        if len(x) <= few_rows.MAX_ROWS:
            few_rows.linear(self.device, y, None, x, self._rows(w), b)
            return
        self.matmul(y, x, self._rows(w), False, True)
        if b is not None:
            elementwise.add_bias(self.device, y, b)

    def linear_backward(
        self, dx: Array | None, dw: Array, db: Array | None, dy: Array, x: Array, w: CudaWeight, acc: bool
    ) -> None:
        if db is not None:
            parts = self.scratch("parts", (1, norm.column_parts(len(dy)), dy.shape[1]))
            norm.column_partials(self.device, parts, dy)
            norm.sum_partials(self.device, (db,), parts, acc)
        self.matmul(dw, dy, x, True, False, acc)
        if dx is not None:
            self.matmul(dx, dy, self._rows(w), False, False)

    def linear_gelu_forward(self, act: Array, pre: Array, x: Array, w: CudaWeight, b: Array) -> None:
        if len(x) <= few_rows.MAX_ROWS:
            few_rows.linear(self.device, pre, act, x, self._rows(w), b)
            return
        self.matmul(pre, x, self._rows(w), False, True)
        elementwise.bias_gelu_forward(self.device, act, pre, b)

    def gelu_forward(self, act: Array, pre: Array) -> None:
        elementwise.gelu_forward(self.device, act, pre)

    def gelu_linear_backward(
        self, dpre: Array, dw: Array, db: Array, dy: Array, act: Array, pre: Array, w: CudaWeight, acc: bool
    ) -> None:
        self.linear_backward(None, dw, db, dy, act, w, acc)
        self.matmul(dpre, dy, self._rows(w), False, False)
        elementwise.gelu_backward(self.device, dpre, pre)

    def attention_forward(self, out: Array, lse: Array, qkv: Array, num_heads: int) -> None:
        attention.attention_forward(self.device, out, lse, qkv, num_heads)

    def attention_backward(self, dqkv: Array, dout: Array, out: Array, lse: Array, qkv: Array, num_heads: int) -> None:
        B, T, C = out.shape
        work = self.scratch("attention", (attention.backward_scratch(B, T, num_heads, C // num_heads),))
        queries = self.scratch("queries", out.shape, out.dtype)
        attention.attention_backward(self.device, dqkv, dout, out, lse, qkv, num_heads, work, queries)

    def attention_cached(
        self, out: Array, keys: Array, values: Array, qkv: Array, lengths: Array, num_heads: int
    ) -> None:
        attention.attention_cached(self.device, out, keys, values, qkv, lengths, num_heads)

    def head_loss(
        self, losses: Array, dx: Array | None, dw: Array | None,
        x: Array, w: CudaWeight, targets: Array, vocab_size: int, dloss: float, acc: bool,
    ) -> None:  # fmt: skip
        rows = self._rows(w)
        N, Vp = len(x), rows.shape[0]
        for start in range(0, N, head_rows(N)):
            here = slice(start, min(N, start + head_rows(N)))
            shape = (here.stop - start, Vp)
            logits = self.scratch("logits", shape)
            dlogits = self.scratch("dlogits", shape, np.uint16) if self.precision == "bf16" else logits
            self.matmul(logits, x[here], rows, False, True)
            gradient = dx is not None
            classifier.softmax_loss(
                self.device, dlogits, losses[here], logits, targets[here], vocab_size, dloss, gradient
            )
            if dx is not None and dw is not None:
                self.matmul(dx[here], dlogits, rows, False, False)
                self.matmul(dw, dlogits, x[here], True, False, acc or start > 0)

    def head_logits(self, logits: Array, x: Array, w: CudaWeight) -> None:
        rows = self._rows(w)[: logits.shape[1]]
        if len(x) <= few_rows.MAX_ROWS:
            few_rows.head_logits(self.device, logits, x, rows)
        else:
            self.matmul(logits, x, rows, False, True)

    def sum_squares(self, out: Array, g: Array) -> None:
        parts = self.scratch("squares", (optimizer.MAX_SQUARE_PARTS,), np.float64)
        optimizer.sum_squares(self.device, out, parts, g)

    def adamw(self, master: Array, m: Array, v: Array, g: Array, segments: Array, hyper: Array, sumsq: Array) -> None:
        optimizer.adamw(self.device, master, m, v, g, segments, hyper, sumsq)
