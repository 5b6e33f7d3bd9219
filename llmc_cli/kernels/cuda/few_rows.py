"""Launches of few_rows.cu."""

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.geometry import row_threads, width
from llmc_cli.kernels.spec import Array

MAX_ROWS = 8
"""Maximum number of rows of x. With more, float32 arithmetic takes longer than reading w in bf16 on an A100."""

OUTPUTS = 4  # rows of w per block; also a constant of few_rows.cu


def linear(device: Device, y: Array, act: Array | None, x: Array, w: Array, b: Array | None) -> None:
    """y (N,O) = x (N,I) · w (O,I)ᵀ + b (O,); if ``act`` is given, act (N,O) = gelu(y). Both overwritten; N at most
    ``MAX_ROWS``. float32 operands are not rounded, whatever the precision."""
    _launch(device, "linear", (y, act), x, w, (b,), y.shape[1])


def head_logits(device: Device, logits: Array, x: Array, w: Array) -> None:
    """logits (N,V) = x (N,C) · w (V or more, C)ᵀ, float32, overwritten; N at most ``MAX_ROWS``."""
    _launch(device, "head", (logits,), x, w, (), logits.shape[1])


def _launch(
    device: Device,
    kernel: str,
    outputs: tuple[Array | None, ...],
    x: Array,
    w: Array,
    more: tuple[Array | None, ...],
    columns: int,
) -> None:
    N, I = x.shape  # noqa: E741
    grid, block = (-(-columns // OUTPUTS),), (row_threads(I, width(device.real)),)
    args = (*outputs, x, w, *more, np.int32(N), np.int32(columns), np.int32(I))
    device.launch("few_rows", f"few_rows_{kernel}_{1 if N == 1 else MAX_ROWS}", grid, block, args)
