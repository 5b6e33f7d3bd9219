"""Layer normalization joined with the addition before it."""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import REORDER, boolean, float1, float2, float32, kernel

ROWS = 32  # rows a task of the backward pass: its partial sums of dw and db are a 32nd of the activations

FORWARD = (float2, float2, float1, float1, float2, float2, float1, float1, float1, float32, boolean, boolean)


@kernel(*FORWARD, fastmath=REORDER)
def norm_forward(res, y, mean, rstd, x, delta, bias, w, b, eps, add, biased):
    """y's row holds the sum until it is normalized: res may be x, and a loop over both would not be vectorized."""
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
            centred = y[i, j] - average
            squares += centred * centred
        inverse = np.float32(1.0) / np.sqrt(squares / np.float32(C) + eps)
        for j in range(C):
            y[i, j] = (y[i, j] - average) * inverse * w[j] + b[j]
        mean[i], rstd[i] = average, inverse


@kernel(float2, float2, float2, float2, float2, float2, float1, float1, float1, float2, boolean, fastmath=REORDER)
def norm_backward(dx, dw, db, rows, dy, res, mean, rstd, w, dres, add):
    """dx, and per task a row of partial sums in dw and db (tasks,C). ``rows`` (tasks,C) is scratch: dx may be dy or
    dres, and a loop over both would not be vectorized."""
    N, C = dx.shape
    for task in prange(dw.shape[0]):
        for j in range(C):
            dw[task, j] = np.float32(0.0)
            db[task, j] = np.float32(0.0)
        for i in range(task * ROWS, min(N, (task + 1) * ROWS)):
            average, inverse = mean[i], rstd[i]
            along_mean, along_normed = np.float32(0.0), np.float32(0.0)
            for j in range(C):
                dnormed = dy[i, j] * w[j]
                along_mean += dnormed
                along_normed += dnormed * ((res[i, j] - average) * inverse)
            along_mean /= np.float32(C)
            along_normed /= np.float32(C)
            for j in range(C):
                dw[task, j] += dy[i, j] * ((res[i, j] - average) * inverse)
                db[task, j] += dy[i, j]
            for j in range(C):
                normed = (res[i, j] - average) * inverse
                rows[task, j] = inverse * (dy[i, j] * w[j] - along_mean - normed * along_normed)
            if add:
                for j in range(C):
                    rows[task, j] += dres[i, j]
            for j in range(C):
                dx[i, j] = rows[task, j]
