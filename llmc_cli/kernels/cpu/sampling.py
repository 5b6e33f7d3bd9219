"""``CpuKernels`` for sampling: a token's few rows stream the weights once, in float32, bfloat16 or int8.

A prompt is many rows: BLAS multiplies them with the same weights, widened to float32 where they are kept in less, so
that prompt and decoding agree. The gradients' operations are those of ``CpuKernels``, which know float32 only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmc_cli.kernels.cpu import embedding, few_rows, linear, norm, quantization
from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, float2, int1, kernel
from llmc_cli.kernels.cpu.kernels import ALIGNMENT, CpuKernels, Float32, Int32

FORMS = ("fp32", "bf16", "int8")
MOST_ROWS = 8  # that the weights are streamed for; for more, BLAS is faster
WIDENED = 1 << 22  # numbers of a matrix that are widened at a time: 16 MB
SLAB = 32 << 20  # bytes; touched, and so taken, only as far as they are filled
NOTHING = np.zeros(0, np.float32)

short_norm = kernel(*norm.FORWARD, fastmath=REORDER, parallel=False)(norm.norm_forward.py_func)
short_embedding = kernel(float2, float2, float2, int1, int1, fastmath=CONTRACT, parallel=False)(
    embedding.embedding_forward.py_func
)


@dataclass(frozen=True)
class Narrow:
    """A matrix in less than float32: ``rows``, as ``narrow`` makes them of ``master`` (O,K), with Kp a multiple of
    ``rows.WIDTH``: of bf16 (O,Kp/2) uint32; of int8 (O,Kp) uint8, and a scale for each row."""

    master: Float32
    rows: NDArray[Any]
    scales: Float32


DecodingWeight: TypeAlias = Any
"""The master itself in fp32, ``Narrow`` otherwise."""


class DecodingKernels(CpuKernels):
    """``form``: what weights are kept in, one of ``FORMS``. ``multiply_steps`` is the kernel for int8: of bytes where
    the processor has such products, or of float32; ``bytewise`` says which."""

    def __init__(
        self,
        threads: int,
        form: str,
        bytewise: bool = few_rows.BYTEWISE,
        multiply_steps: Callable[..., None] = few_rows.int8_rows,
    ) -> None:
        super().__init__(threads)
        self.form, self.bytewise, self.multiply_steps = form, bytewise, multiply_steps
        self._slab = self.alloc((0,), np.uint8)

    def products_name(self) -> str:
        """What multiplies a token's few_rows, in words."""
        means = "products of bytes" if self.form == "int8" and self.bytewise else "float32 arithmetic"
        return f"{self.form} weights, {means}"

    def bind(self, master: Float32) -> DecodingWeight:
        if self.form == "fp32":
            return master
        O, K = master.shape  # noqa: E741
        padded = -(-K // few_rows.WIDTH) * few_rows.WIDTH
        if self.form == "bf16":
            return Narrow(master, self._lasting((O, padded // 2), np.uint32), NOTHING)
        return Narrow(master, self._lasting((O, padded), np.uint8), self._lasting((O,), np.float32))

    def _lasting(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Memory out of slabs so large that the system backs them with large pages: reading small ones takes a quarter
        longer."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        if len(self._slab) < padded:
            self._slab = self.alloc((max(SLAB, padded),), np.uint8)
        taken, self._slab = self._slab[:size], self._slab[padded:]
        return taken.view(dtype).reshape(shape)

    def publish(self, weights: list[DecodingWeight]) -> None:
        for weight in weights:
            if self.form == "bf16":
                quantization.round_rows(weight.rows, weight.master.view(np.uint32))
            elif self.form == "int8":
                quantization.quantize_rows(weight.rows, weight.scales, weight.master)

    def embedding_forward(self, x: Float32, wte: Float32, wpe: Float32, ids: Int32, positions: Int32) -> None:
        forward = short_embedding if len(x) <= MOST_ROWS else embedding.embedding_forward
        forward(x, wte, wpe, ids, positions)

    def residual_norm_forward(
        self, res: Float32, y: Float32, mean: Float32, rstd: Float32,
        x: Float32, delta: Float32 | None, bias: Float32 | None, w: Float32, b: Float32, eps: float,
    ) -> None:  # fmt: skip
        forward = short_norm if len(y) <= MOST_ROWS else norm.norm_forward
        add, biased = delta is not None, bias is not None
        forward(res, y, mean, rstd, x, delta if add else x, bias if biased else b, w, b, eps, add, biased)

    def linear_forward(self, y: Float32, x: Float32, w: DecodingWeight, b: Float32 | None) -> None:
        if len(x) <= MOST_ROWS:
            self._stream(y, y, x, w, b, False)
        else:
            self._multiply(y, x, w, b)

    def linear_gelu_forward(self, act: Float32, pre: Float32, x: Float32, w: DecodingWeight, b: Float32) -> None:
        if len(x) <= MOST_ROWS:
            self._stream(pre, act, x, w, b, True)
        else:
            self._multiply(pre, x, w, b)
            self.gelu_forward(act, pre)

    def head_logits(self, logits: Float32, x: Float32, w: DecodingWeight) -> None:
        self.linear_forward(logits, x, w, None)

    def head_loss(
        self, losses: Float32, dx: Float32 | None, dw: Float32 | None,
        x: Float32, w: DecodingWeight, targets: Int32, vocab_size: int, dloss: float, acc: bool,
    ) -> None:  # fmt: skip
        if isinstance(w, Narrow):
            w = self._widen(w, 0, len(w.rows))
        super().head_loss(losses, dx, dw, x, w, targets, vocab_size, dloss, acc)

    def _stream(
        self, y: Float32, act: Float32, x: Float32, w: DecodingWeight, b: Float32 | None, activated: bool
    ) -> None:
        """y (N,O) = x (N,K) · w (≥O,K)ᵀ + b (O,), and with ``activated`` act (N,O) = gelu(y), w read once."""
        N, K = x.shape
        biased = b is not None
        padded = -(-K // few_rows.WIDTH) * few_rows.WIDTH
        if padded != K:
            if not isinstance(w, Narrow):
                self._multiply(y, x, w, b)
                if activated:
                    self.gelu_forward(act, y)
                return
            wide = self.scratch("padded", (N, padded))
            wide[:, :K] = x
            wide[:, K:] = 0.0
            x = wide
        if not isinstance(w, Narrow):
            few_rows.fp32_rows(y, act, x, w, NOTHING, b if biased else NOTHING, False, biased, activated)
        elif self.form == "bf16":
            few_rows.bf16_rows(y, act, x, w.rows, NOTHING, b if biased else NOTHING, False, biased, activated)
        elif self.bytewise:
            digits = self.scratch("digits", (N, 2, padded), np.int8)
            starts, steps = self.scratch("starts", (N, 2), np.int32), self.scratch("steps", (N,))
            self.multiply_steps(
                y, act, x, w.rows, w.scales, b if biased else NOTHING, biased, activated, digits, starts, steps
            )
        else:
            self.multiply_steps(y, act, x, w.rows, w.scales, b if biased else NOTHING, True, biased, activated)

    def _multiply(self, y: Float32, x: Float32, w: DecodingWeight, b: Float32 | None) -> None:
        """The same by BLAS, without the activation."""
        O, K = y.shape[1], x.shape[1]  # noqa: E741
        if not isinstance(w, Narrow):
            self.matmul(y, x, w[:O], False, True, False, b)
            return
        if b is not None:
            linear.fill_rows(y, b)
        block = max(1, WIDENED // K)
        for start in range(0, O, block):
            stop = min(O, start + block)
            self.matmul(y[:, start:stop], x, self._widen(w, start, stop), False, True, b is not None, None)

    def _widen(self, w: Narrow, start: int, stop: int) -> Float32:
        """Rows of a matrix as float32, in scratch memory."""
        wide = self.scratch("widened", (stop - start, w.master.shape[1]))
        if self.form == "bf16":
            quantization.expand_bfloat16(wide.view(np.uint32), w.rows[start:stop])
        else:
            quantization.expand_steps(wide, w.rows[start:stop], w.scales[start:stop])
        return wide
