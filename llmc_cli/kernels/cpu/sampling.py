"""``CpuKernels`` for sampling: products of a few rows stream the weights once, in float32, bfloat16 or int8.

Products of many rows, as in prompts, are computed by BLAS with the same weights, converted to float32, so prompts and
single tokens agree. The gradient operations are those of ``CpuKernels``, in float32 only.
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

MAX_STREAMED_ROWS = 8  # BLAS is faster for more
DEQUANTIZED_NUMBERS = 1 << 22  # of a matrix that are converted at a time: 16 MB
SLAB = 32 << 20  # bytes; the system provides memory only for the touched part
EMPTY = np.zeros(0, np.float32)

short_norm = kernel(*norm.FORWARD, fastmath=REORDER, parallel=False)(norm.norm_forward.py_func)
short_embedding = kernel(float2, float2, float2, int1, int1, fastmath=CONTRACT, parallel=False)(
    embedding.embedding_forward.py_func
)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix in bf16 or int8, as quantization.py makes it of ``master`` (O,K).

    Kp is K rounded up to a multiple of ``few_rows.WIDTH``. bf16: ``rows`` (O,Kp/2) uint32. int8: ``rows`` (O,Kp) uint8
    and ``scales`` (O,).
    """

    master: Float32
    rows: NDArray[Any]
    scales: Float32


SamplingWeight: TypeAlias = Any
"""The master itself in fp32, else a ``QuantizedWeight``."""


class SamplingKernels(CpuKernels):
    """``precision``: that of the weights, fp32, bf16 or int8. ``int8_rows``: the kernel for int8 weights.
    ``byte_products``: whether that kernel multiplies bytes, not float32."""

    def __init__(
        self,
        threads: int,
        precision: str,
        byte_products: bool = few_rows.BYTE_PRODUCTS,
        int8_rows: Callable[..., None] = few_rows.int8_rows,
    ) -> None:
        super().__init__(threads)
        self.precision, self.byte_products, self.int8_rows = precision, byte_products, int8_rows
        self._slab = self.alloc((0,), np.uint8)

    def products_name(self) -> str:
        """Describe how the products of a token are computed."""
        arithmetic = (
            "int8 dot products (VNNI)" if self.precision == "int8" and self.byte_products else "float32 arithmetic"
        )
        return f"{self.precision} weights, {arithmetic}"

    def bind(self, master: Float32) -> SamplingWeight:
        if self.precision == "fp32":
            return master
        O, K = master.shape  # noqa: E741
        padded = -(-K // few_rows.WIDTH) * few_rows.WIDTH
        if self.precision == "bf16":
            return QuantizedWeight(master, self._alloc_weight((O, padded // 2), np.uint32), EMPTY)
        rows, scales = self._alloc_weight((O, padded), np.uint8), self._alloc_weight((O,), np.float32)
        return QuantizedWeight(master, rows, scales)

    def _alloc_weight(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Allocate from slabs so large that the system backs them with huge pages: reading from small pages takes a
        quarter longer."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        padded = -(-size // ALIGNMENT) * ALIGNMENT
        if len(self._slab) < padded:
            self._slab = self.alloc((max(SLAB, padded),), np.uint8)
        taken, self._slab = self._slab[:size], self._slab[padded:]
        return taken.view(dtype).reshape(shape)

    def publish(self, weights: list[SamplingWeight]) -> None:
        for weight in weights:
            if self.precision == "bf16":
                quantization.round_rows(weight.rows, weight.master.view(np.uint32))
            elif self.precision == "int8":
                quantization.quantize_rows(weight.rows, weight.scales, weight.master)

    def embedding_forward(self, x: Float32, wte: Float32, wpe: Float32, ids: Int32, positions: Int32) -> None:
        forward = short_embedding if len(x) <= MAX_STREAMED_ROWS else embedding.embedding_forward
        forward(x, wte, wpe, ids, positions)

    def residual_norm_forward(
        self, res: Float32, y: Float32, mean: Float32, rstd: Float32,
        x: Float32, delta: Float32 | None, bias: Float32 | None, w: Float32, b: Float32, eps: float,
    ) -> None:  # fmt: skip
        forward = short_norm if len(y) <= MAX_STREAMED_ROWS else norm.norm_forward
        add, biased = delta is not None, bias is not None
        forward(res, y, mean, rstd, x, delta if add else x, bias if biased else b, w, b, eps, add, biased)

    def linear_forward(self, y: Float32, x: Float32, w: SamplingWeight, b: Float32 | None) -> None:
        if len(x) <= MAX_STREAMED_ROWS:
            self._stream(y, y, x, w, b, False)
        else:
            self._multiply(y, x, w, b)

    def linear_gelu_forward(self, act: Float32, pre: Float32, x: Float32, w: SamplingWeight, b: Float32) -> None:
        if len(x) <= MAX_STREAMED_ROWS:
            self._stream(pre, act, x, w, b, True)
        else:
            self._multiply(pre, x, w, b)
            self.gelu_forward(act, pre)

    def head_logits(self, logits: Float32, x: Float32, w: SamplingWeight) -> None:
        self.linear_forward(logits, x, w, None)

    def head_loss(
        self, losses: Float32, dx: Float32 | None, dw: Float32 | None,
        x: Float32, w: SamplingWeight, targets: Int32, vocab_size: int, dloss: float, acc: bool,
    ) -> None:  # fmt: skip
        if isinstance(w, QuantizedWeight):
            w = self._dequantize(w, 0, len(w.rows))
        super().head_loss(losses, dx, dw, x, w, targets, vocab_size, dloss, acc)

    def _stream(
        self, y: Float32, act: Float32, x: Float32, w: SamplingWeight, b: Float32 | None, apply_gelu: bool
    ) -> None:
        """y (N,O) = x (N,K) · w (≥O,K)ᵀ + b (O,), and with ``apply_gelu`` act (N,O) = gelu(y), w read once."""
        N, K = x.shape
        biased = b is not None
        padded = -(-K // few_rows.WIDTH) * few_rows.WIDTH
        if padded != K:
            if not isinstance(w, QuantizedWeight):
                self._multiply(y, x, w, b)
                if apply_gelu:
                    self.gelu_forward(act, y)
                return
            padded_x = self.scratch("padded", (N, padded))
            padded_x[:, :K] = x
            padded_x[:, K:] = 0.0
            x = padded_x
        if not isinstance(w, QuantizedWeight):
            few_rows.fp32_rows(y, act, x, w, EMPTY, b if biased else EMPTY, False, biased, apply_gelu)
        elif self.precision == "bf16":
            few_rows.bf16_rows(y, act, x, w.rows, EMPTY, b if biased else EMPTY, False, biased, apply_gelu)
        elif self.byte_products:
            digits = self.scratch("digits", (N, 2, padded), np.int8)
            starts, steps = self.scratch("starts", (N, 2), np.int32), self.scratch("steps", (N,))
            self.int8_rows(
                y, act, x, w.rows, w.scales, b if biased else EMPTY, biased, apply_gelu, digits, starts, steps
            )
        else:
            self.int8_rows(y, act, x, w.rows, w.scales, b if biased else EMPTY, True, biased, apply_gelu)

    def _multiply(self, y: Float32, x: Float32, w: SamplingWeight, b: Float32 | None) -> None:
        """As ``_stream`` by BLAS, without the activation."""
        O, K = y.shape[1], x.shape[1]  # noqa: E741
        if not isinstance(w, QuantizedWeight):
            self.matmul(y, x, w[:O], transpose_b=True, bias=b)
            return
        if b is not None:
            linear.fill_rows(y, b)
        block = max(1, DEQUANTIZED_NUMBERS // K)
        for start in range(0, O, block):
            stop = min(O, start + block)
            rows = self._dequantize(w, start, stop)
            self.matmul(y[:, start:stop], x, rows, transpose_b=True, acc=b is not None)

    def _dequantize(self, w: QuantizedWeight, start: int, stop: int) -> Float32:
        """Return rows of a matrix as float32, in scratch memory."""
        rows = self.scratch("dequantized", (stop - start, w.master.shape[1]))
        if self.precision == "bf16":
            quantization.expand_bfloat16(rows.view(np.uint32), w.rows[start:stop])
        else:
            quantization.expand_int8(rows, w.rows[start:stop], w.scales[start:stop])
        return rows
