"""``spec.Kernels`` on the CPU in float32: what runs for each operation, and the scratch memory it needs."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numba
import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc_cli.kernels.cpu import blas, classifier, embedding, linear, loading, memory, norm, optimizer
from llmc_cli.kernels.cpu.matmul import BlasMatmul, Matmul

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

SUM_PIECES = 1024
ALIGNMENT = 64  # bytes
LARGE = 1 << 25  # bytes: what is larger is cleared at once, by all threads


class CpuKernels:
    """Float32 on ``threads`` threads, BLAS included. A weight is its master array. ``matmul`` is what multiplies
    matrices, BLAS where nothing else is said, and ``attend`` the module of attention's kernels in training, float32's
    where nothing else is said. Those in float32 are loaded when they are needed, and ``on_compile`` told if they have
    to be compiled.

    Scratch arrays are named, grow to the largest call and stay; views of them are handed out by shape.
    """

    name: str = "cpu"
    device_name: str = ""
    dtype: Any = np.float32
    activation_dtype: Any = np.float32

    def __init__(
        self,
        threads: int,
        matmul: Matmul | None = None,
        attend: ModuleType | None = None,
        on_compile: Callable[[str], None] | None = None,
    ) -> None:
        self.matmul, self._attend, self._on_compile = matmul or BlasMatmul(), attend, on_compile
        self._scratch: dict[str, NDArray[Any]] = {}
        self._set_threads(threads)

    def _set_threads(self, threads: int) -> None:
        self.threads = threads
        numba.set_num_threads(threads)
        blas.limit_threads(threads)

    @functools.cached_property
    def _attention(self) -> ModuleType:
        return loading.load_attention(self._on_compile)

    @functools.cached_property
    def _cached_attention(self) -> ModuleType:
        return loading.load_cached_attention(self._on_compile)

    @property
    def attend(self) -> ModuleType:
        return self._attend or self._attention

    @contextlib.contextmanager
    def limited_to(self, threads: int) -> Iterator[None]:
        """Run on fewer threads inside the block."""
        kept = self.threads
        self._set_threads(threads)
        try:
            yield
        finally:
            self._set_threads(kept)

    def alloc(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size <= LARGE:
            raw = np.zeros(size + ALIGNMENT, np.uint8)
        else:
            raw = np.empty(size + ALIGNMENT, np.uint8)
            memory.clear(raw)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size].view(dtype).reshape(shape)

    def upload(self, array: NDArray[Any], values: NDArray[Any]) -> None:
        if array is not values:
            array[...] = values

    def upload_async(self, array: NDArray[Any], values: NDArray[Any]) -> None:
        self.upload(array, values)

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def copy(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        target[...] = source

    def synchronize(self) -> None:
        pass

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def scratch(self, name: str, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Memory that the next call of the same name may overwrite; its content is whatever it was."""
        size = math.prod(shape)
        flat = self._scratch.get(name)
        if flat is None or flat.size < size:
            flat = self._scratch[name] = self.alloc((size,), dtype)
        return flat[:size].reshape(shape)

    def scratch_bytes(self) -> int:
        """Bytes of scratch memory held now."""
        return sum(flat.nbytes for flat in self._scratch.values()) + self.matmul.scratch_bytes()

    def launch_count(self) -> int:
        return 0

    def held_bytes(self) -> int:
        return 0

    def release_memory(self) -> None:
        pass

    def workspace_bytes(self, B: int, T: int, channels: int, num_heads: int, padded_vocab_size: int) -> int:
        """Bytes of scratch memory that training steps of this size come to."""
        work: int = self.threads * self.attend.work_floats(T, channels // num_heads)
        C, N, rows = channels, B * T, min(self.matmul.head_rows, B * T)
        logits = rows * padded_vocab_size
        sums = 3 * -(-B * T // norm.ROWS) * channels
        # outputs, inputs and rows of the products; each has three: forward, and the gradients of inputs and weights
        layers = [(3 * C, C, N), (C, C, N), (4 * C, C, N), (C, 4 * C, N), (padded_vocab_size, C, rows)]
        sizes = [(R, out, into) for out, into, R in layers]
        sizes += [(R, into, out) for out, into, R in layers] + layers
        return 4 * (work + logits + sums) + 8 * SUM_PIECES + self.matmul.workspace_bytes(sizes, self.threads)

    def bind_bytes(self, numbers: int) -> int:
        return 0

    def bind(self, master: Float32) -> Float32:
        return master

    def publish(self, weights: list[Float32]) -> None:
        pass

    def embedding_forward(self, x: Float32, wte: Float32, wpe: Float32, ids: Int32, positions: Int32) -> None:
        embedding.embedding_forward(x, wte, wpe, ids, positions)

    def embedding_backward(
        self, dwte: Float32, dwpe: Float32, dx: Float32, ids: Int32, positions: Int32, acc: bool
    ) -> None:
        embedding.embedding_backward(dwte, dwpe, dx, ids, positions, acc)

    def residual_norm_forward(
        self, res: Float32, y: Float32, mean: Float32, rstd: Float32,
        x: Float32, delta: Float32 | None, bias: Float32 | None, w: Float32, b: Float32, eps: float,
    ) -> None:  # fmt: skip
        add, biased = delta is not None, bias is not None
        norm.norm_forward(res, y, mean, rstd, x, delta if add else x, bias if biased else b, w, b, eps, add, biased)

    def residual_norm_backward(
        self, dx: Float32, dw: Float32, db: Float32,
        dy: Float32, res: Float32, mean: Float32, rstd: Float32, w: Float32, dres: Float32 | None, acc: bool,
    ) -> None:  # fmt: skip
        N, C = dx.shape
        parts = self.scratch("norm", (3, -(-N // norm.ROWS), C))
        add = dres is not None
        norm.norm_backward(dx, parts[0], parts[1], parts[2], dy, res, mean, rstd, w, dres if add else dy, add)
        linear.sum_rows(dw, parts[0], acc)
        linear.sum_rows(db, parts[1], acc)

    def linear_forward(self, y: Float32, x: Float32, w: Float32, b: Float32 | None) -> None:
        self.matmul(y, x, w, False, True, False, b)

    def linear_backward(
        self, dx: Float32 | None, dw: Float32, db: Float32 | None, dy: Float32, x: Float32, w: Float32, acc: bool
    ) -> None:
        self.matmul(dw, dy, x, True, False, acc, None, line_sums=db)
        if dx is not None:
            self.matmul(dx, dy, w, False, False, False, None)

    def linear_gelu_forward(self, act: Float32, pre: Float32, x: Float32, w: Float32, b: Float32) -> None:
        self.matmul(pre, x, w, False, True, False, b, act=act)

    def gelu_forward(self, act: Float32, pre: Float32) -> None:
        linear.gelu_forward(act.reshape(-1), pre.reshape(-1))

    def gelu_linear_backward(
        self, dpre: Float32, dw: Float32, db: Float32, dy: Float32, act: Float32, pre: Float32, w: Float32, acc: bool
    ) -> None:
        self.linear_backward(None, dw, db, dy, act, w, acc)
        self.matmul(dpre, dy, w, False, False, False, None, pre=pre)

    def attention_forward(self, out: Float32, lse: Float32, qkv: Float32, num_heads: int) -> None:
        B, T, C = out.shape
        work = self.scratch("attention", (self.threads, self.attend.work_floats(T, C // num_heads)))
        self.attend.attention_forward(
            out.reshape(-1), lse.reshape(-1), qkv.reshape(-1), work, B, T, num_heads, C // num_heads
        )

    def attention_backward(
        self, dqkv: Float32, dout: Float32, out: Float32, lse: Float32, qkv: Float32, num_heads: int
    ) -> None:
        B, T, C = out.shape
        work = self.scratch("attention", (self.threads, self.attend.work_floats(T, C // num_heads)))
        self.attend.attention_backward(
            dqkv.reshape(-1), dout.reshape(-1), out.reshape(-1), lse.reshape(-1), qkv.reshape(-1),
            work, B, T, num_heads, C // num_heads,
        )  # fmt: skip

    def attention_cached(
        self, out: Float32, keys: Float32, values: Float32, qkv: Float32, lengths: Int32, num_heads: int
    ) -> None:
        T, (_, NH, Tmax, HS) = out.shape[1], keys.shape
        work = self.scratch("attention", (self.threads, self._cached_attention.work_floats(Tmax, HS)))
        lse = self.scratch("lse", (self.threads, T))
        self._cached_attention.attention_cached(
            out.reshape(-1), keys.reshape(-1), values.reshape(-1), qkv.reshape(-1), lengths, work, lse, T, Tmax, NH, HS
        )

    def head_loss(
        self, losses: Float32, dx: Float32 | None, dw: Float32 | None,
        x: Float32, w: Float32, targets: Int32, vocab_size: int, dloss: float, acc: bool,
    ) -> None:  # fmt: skip
        N, (Vp, _), V = len(x), w.shape, vocab_size
        for start in range(0, N, self.matmul.head_rows):
            rows = slice(start, min(N, start + self.matmul.head_rows))
            whole = self.scratch("logits", (rows.stop - start, Vp))
            logits, hidden = whole[:, :V], x[rows]  # (R, V), (R, C)
            self.matmul(logits, hidden, w[:V], False, True, False, None)
            classifier.softmax_loss(losses[rows], whole, targets[rows], V, dloss, dx is not None)
            if dx is not None and dw is not None:
                self.matmul(dx[rows], logits, w[:V], False, False, False, None)
                self.matmul(dw[:V], logits, hidden, True, False, acc or start > 0, None)
        if dw is not None and not acc:
            dw[V:] = 0.0

    def head_logits(self, logits: Float32, x: Float32, w: Float32) -> None:
        self.matmul(logits, x, w[: logits.shape[1]], False, True, False, None)

    def sum_squares(self, out: Float64, g: Float32) -> None:
        optimizer.sum_squares(out, self.scratch("sums", (SUM_PIECES,), np.float64), g)

    def adamw(
        self, master: Float32, m: Float32, v: Float32, g: Float32,
        segments: NDArray[np.int64], hyper: Float64, sumsq: Float64,
    ) -> None:  # fmt: skip
        norm_squared, max_norm = float(sumsq[0]), float(hyper[-1])
        clipped = max_norm > 0.0 and norm_squared > max_norm**2
        optimizer.adamw(master, m, v, g, segments, hyper, max_norm / math.sqrt(norm_squared) if clipped else 1.0)
