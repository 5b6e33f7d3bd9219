"""Layer normalization, fused with the addition before it."""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import REORDER, boolean, float1, float2, float32, kernel

ROWS = 32  # rows per task of the backward pass: the partial sums of dw and db are 1/32 of the activations

FORWARD = (float2, float2, float1, float1, float2, float2, float1, float1, float1, float32, boolean, boolean)


@kernel(*FORWARD, fastmath=REORDER)
def norm_forward(res, y, mean, rstd, x, delta, bias, w, b, eps, add, biased):
    """``spec.Kernels.residual_norm_forward`` on (N,C), with delta only if ``add``, and bias only if ``biased``.

    The sum is first stored in y: res may be x, and LLVM would not vectorize a loop over both.
    """
    N, C = y.shape
    for i in prange(N):
        total = np.float32(0.0)
        if biased:
            for j in range(C):
                y[i, j] = x[i, j] + (delta[i, j] + bias[j])
        elif add:
            for j in range(C):
                y[i, j] = x[i, j] + delta[i, j]
        else:
            for j in range(C):
                y[i, j] = x[i, j]
        if add:
            for j in range(C):
                res[i, j] = y[i, j]
        for j in range(C):
            total += y[i, j]
        average = total / np.float32(C)
        squares = np.float32(0.0)
        for j in range(C):
            centered = y[i, j] - average
            squares += centered * centered
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(C) + eps)
        for j in range(C):
            y[i, j] = (y[i, j] - average) * inverse * w[j] + b[j]
        mean[i], rstd[i] = average, inverse


@kernel(float2, float2, float2, float2, float2, float2, float1, float1, float1, float2, boolean, fastmath=REORDER)
def norm_backward(dx, dw, db, row, dy, res, mean, rstd, w, dres, add):
    """``spec.Kernels.residual_norm_backward`` on (N,C), dres only if ``add``; dw and db (tasks,C) are partial sums.

    ``row`` (tasks,C) is scratch memory: dx may be dy or dres, and LLVM would not vectorize a loop over both.
    """
    N, C = dx.shape
    for task in prange(dw.shape[0]):
        for j in range(C):
            dw[task, j] = np.float32(0.0)
            db[task, j] = np.float32(0.0)
        for i in range(task * ROWS, min(N, (task + 1) * ROWS)):
            average, inverse = mean[i], rstd[i]
            mean_dnormed, mean_product = np.float32(0.0), np.float32(0.0)
            for j in range(C):
                dnormed = dy[i, j] * w[j]
                mean_dnormed += dnormed
                mean_product += dnormed * ((res[i, j] - average) * inverse)
            mean_dnormed /= np.float32(C)
            mean_product /= np.float32(C)
            for j in range(C):
                dw[task, j] += dy[i, j] * ((res[i, j] - average) * inverse)
                db[task, j] += dy[i, j]
            for j in range(C):
                normed = (res[i, j] - average) * inverse
                row[task, j] = inverse * (dy[i, j] * w[j] - mean_dnormed - normed * mean_product)
            if add:
                for j in range(C):
                    row[task, j] += dres[i, j]
            for j in range(C):
                dx[i, j] = row[task, j]
