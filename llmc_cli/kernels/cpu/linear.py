"""Bias, GELU and row sums around a matrix product."""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, boolean, float1, float2, helper, kernel
from llmc_cli.kernels.cpu.exponential import ONE, exp

PIECE = 4096  # elements per task
BLOCK = 64  # columns per task

SLOPE = np.float32(2.0 * np.sqrt(2.0 / np.pi))
CUBIC = np.float32(SLOPE * 0.044715)
CUBIC_SLOPE = np.float32(3.0 * SLOPE * 0.044715)
LIMIT = np.float32(10.0)  # beyond it gelu' is 0 or 1, and the products below would overflow


@kernel(float2, float1, fastmath=REORDER)
def fill_rows(y, b):
    """Each row of y (N,O) = b (O,)."""
    N, O = y.shape  # noqa: E741
    for i in prange(N):
        for j in range(O):
            y[i, j] = b[j]


@helper(REORDER, inline=False)
def add_four(out, a, b, c, d):
    for j in range(out.size):
        out[j] += (a[j] + b[j]) + (c[j] + d[j])


@helper(REORDER, inline=False)
def add_one(out, a):
    for j in range(out.size):
        out[j] += a[j]


@kernel(float1, float2, boolean, fastmath=REORDER)
def sum_rows(out, x, acc):
    """out (O,) = the sum of x (N,O) over rows, overwritten, or added to with ``acc``."""
    N, O = x.shape  # noqa: E741
    for block in prange((O + BLOCK - 1) // BLOCK):
        columns = slice(block * BLOCK, min(O, (block + 1) * BLOCK))
        part = out[columns]
        if not acc:
            part[:] = np.float32(0.0)
        even = N - N % 4
        for i in range(0, even, 4):
            add_four(part, x[i, columns], x[i + 1, columns], x[i + 2, columns], x[i + 3, columns])
        for i in range(even, N):
            add_one(part, x[i, columns])


@helper(CONTRACT, inline=False)
def gelu_piece(act, pre):
    for i in range(pre.size):
        x = pre[i]
        act[i] = x / (ONE + exp(-x * (SLOPE + CUBIC * (x * x))))


@kernel(float1, float1, fastmath=CONTRACT)
def gelu_forward(act, pre):
    """act (P,) = gelu(pre (P,)) = pre/2 · (1 + tanh(u/2)) = pre / (1 + exp(-u)), with
    u = SLOPE · (pre + 0.044715 pre³)."""
    for piece in prange((pre.size + PIECE - 1) // PIECE):
        here = slice(piece * PIECE, min(pre.size, (piece + 1) * PIECE))
        gelu_piece(act[here], pre[here])


@helper(CONTRACT, inline=False)
def gelu_piece_backward(dpre, pre):
    for i in range(pre.size):
        x = pre[i]
        x = LIMIT if x > LIMIT else x
        x = -LIMIT if x < -LIMIT else x
        e = exp(-x * (SLOPE + CUBIC * (x * x)))
        s = ONE / (ONE + e)
        dpre[i] *= s + x * s * (e * s) * (SLOPE + CUBIC_SLOPE * (x * x))


@kernel(float1, float1, fastmath=CONTRACT)
def gelu_backward(dpre, pre):
    """dpre (P,) is multiplied by gelu'(pre) = s + pre · s · (1 - s) · du/dpre, with s = 1 / (1 + exp(-u)) and
    1 - s = s · exp(-u); u is that of ``gelu_forward``."""
    for piece in prange((pre.size + PIECE - 1) // PIECE):
        here = slice(piece * PIECE, min(pre.size, (piece + 1) * PIECE))
        gelu_piece_backward(dpre[here], pre[here])
