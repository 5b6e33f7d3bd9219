"""``spec.Kernels`` on the CPU in float32: calls the kernels of each operation and owns their scratch memory."""

import functools
import math
from collections.abc import Callable
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

SUM_PIECES = 1024  # partial sums of ``sum_squares``
ALIGNMENT = 64  # bytes
PARALLEL_CLEAR = 1 << 25  # bytes: larger arrays are cleared by all threads


class CpuKernels:
    """Float32 operations on ``threads`` threads, BLAS included. A weight is its master array.

    ``matmul`` computes the matrix products; the default is BLAS. ``attention`` is the module with the attention kernels
    for training. By default the float32 kernels, which are loaded when they are first used: ``on_compile`` is called
    before a wait for the compiler.

    Scratch arrays have names and grow to the largest call; callers get views of the shape that they need.
    """

    name: str = "cpu"
    device_name: str = ""
    dtype: Any = np.float32
    activation_dtype: Any = np.float32

    def __init__(
        self,
        threads: int,
        matmul: Matmul | None = None,
        attention: ModuleType | None = None,
        on_compile: Callable[[str], None] | None = None,
    ) -> None:
        self.matmul, self._attention, self._on_compile = matmul or BlasMatmul(), attention, on_compile
        self._scratch: dict[str, NDArray[Any]] = {}
        self.set_threads(threads)

    def set_threads(self, threads: int) -> None:
        """Set the number of threads of numba and BLAS, which is the same for all kernels of this process."""
        self.threads = threads
        numba.set_num_threads(threads)
        blas.limit_threads(threads)

    @functools.cached_property
    def attention(self) -> ModuleType:
        return self._attention or loading.load(loading.ATTENTION, self._on_compile)

    @functools.cached_property
    def _cached_attention(self) -> ModuleType:
        return loading.load(loading.CACHED_ATTENTION, self._on_compile)

    def alloc(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size <= PARALLEL_CLEAR:
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
        """Return uninitialized memory, valid until the next call with the same name."""
        size = math.prod(shape)
        flat = self._scratch.get(name)
        if flat is None or flat.size < size:
            flat = self._scratch[name] = self.alloc((size,), dtype)
        return flat[:size].reshape(shape)

    def launch_count(self) -> int:
        return 0

    def held_bytes(self) -> int:
        return 0

    def release_memory(self) -> None:
        pass

    def workspace_bytes(self, B: int, T: int, channels: int, num_heads: int, padded_vocab_size: int) -> int:
        attention: int = self.threads * self.attention.work_floats(T, channels // num_heads)
        C, N, rows = channels, B * T, min(self.matmul.head_rows, B * T)
        logits = rows * padded_vocab_size
        norm_sums = 3 * -(-N // norm.ROWS) * C
        # (rows, outputs, inputs) of each layer's forward product; backward has two more, for dx and dw
        layers = [(N, 3 * C, C), (N, C, C), (N, 4 * C, C), (N, C, 4 * C), (rows, padded_vocab_size, C)]
        sizes = [size for R, O, I in layers for size in ((R, O, I), (R, I, O), (O, I, R))]  # M, N, K  # noqa: E741
        matmul = self.matmul.workspace_bytes(sizes, self.threads)
        return 4 * (attention + logits + norm_sums) + 8 * SUM_PIECES + matmul

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
        partial_dw, partial_db, row = self.scratch("norm", (3, -(-N // norm.ROWS), C))
        add = dres is not None
        norm.norm_backward(dx, partial_dw, partial_db, row, dy, res, mean, rstd, w, dres if add else dy, add)
        linear.sum_rows(dw, partial_dw, acc)
        linear.sum_rows(db, partial_db, acc)

    def linear_forward(self, y: Float32, x: Float32, w: Float32, b: Float32 | None) -> None:
        self.matmul(y, x, w, transpose_b=True, bias=b)

    def linear_backward(
        self, dx: Float32 | None, dw: Float32, db: Float32 | None, dy: Float32, x: Float32, w: Float32, acc: bool
    ) -> None:
        self.matmul(dw, dy, x, transpose_a=True, acc=acc, dbias=db)
        if dx is not None:
            self.matmul(dx, dy, w)

    def linear_gelu_forward(self, act: Float32, pre: Float32, x: Float32, w: Float32, b: Float32) -> None:
        self.matmul(pre, x, w, transpose_b=True, bias=b, act=act)

    def gelu_forward(self, act: Float32, pre: Float32) -> None:
        linear.gelu_forward(act.reshape(-1), pre.reshape(-1))

    def gelu_linear_backward(
        self, dpre: Float32, dw: Float32, db: Float32, dy: Float32, act: Float32, pre: Float32, w: Float32, acc: bool
    ) -> None:
        self.linear_backward(None, dw, db, dy, act, w, acc)
        self.matmul(dpre, dy, w, pre=pre)

    def attention_forward(self, out: Float32, lse: Float32, qkv: Float32, num_heads: int) -> None:
        B, T, C = out.shape
        work = self.scratch("attention", (self.threads, self.attention.work_floats(T, C // num_heads)))
        self.attention.attention_forward(
            out.reshape(-1), lse.reshape(-1), qkv.reshape(-1), work, B, T, num_heads, C // num_heads
        )

    def attention_backward(
        self, dqkv: Float32, dout: Float32, out: Float32, lse: Float32, qkv: Float32, num_heads: int
    ) -> None:
        B, T, C = out.shape
        work = self.scratch("attention", (self.threads, self.attention.work_floats(T, C // num_heads)))
        self.attention.attention_backward(
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
            padded = self.scratch("logits", (rows.stop - start, Vp))
            logits, hidden = padded[:, :V], x[rows]  # (R, V), (R, C)
            self.matmul(logits, hidden, w[:V], transpose_b=True)
            classifier.softmax_loss(losses[rows], padded, targets[rows], V, dloss, dx is not None)
            if dx is not None and dw is not None:
                self.matmul(dx[rows], logits, w[:V])
                self.matmul(dw[:V], logits, hidden, transpose_a=True, acc=acc or start > 0)
        if dw is not None and not acc:
            dw[V:] = 0.0

    def head_logits(self, logits: Float32, x: Float32, w: Float32) -> None:
        self.matmul(logits, x, w[: logits.shape[1]], transpose_b=True)

    def sum_squares(self, out: Float64, g: Float32) -> None:
        optimizer.sum_squares(out, self.scratch("sums", (SUM_PIECES,), np.float64), g)

    def adamw(
        self, master: Float32, m: Float32, v: Float32, g: Float32,
        segments: NDArray[np.int64], hyper: Float64, sumsq: Float64,
    ) -> None:  # fmt: skip
        norm_squared, max_norm = float(sumsq[0]), float(hyper[-1])
        clipped = max_norm > 0.0 and norm_squared > max_norm**2
        optimizer.adamw(master, m, v, g, segments, hyper, max_norm / math.sqrt(norm_squared) if clipped else 1.0)
