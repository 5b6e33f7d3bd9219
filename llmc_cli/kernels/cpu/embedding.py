"""Token and position embedding."""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, boolean, float2, helper, int1, kernel

BLOCK = 64  # channels per task: four cache lines of each row


@kernel(float2, float2, float2, int1, int1, fastmath=CONTRACT)
def embedding_forward(x, wte, wpe, ids, positions):
    """``spec.Kernels.embedding_forward``: x (N,C), wte (Vp,C), wpe (T,C), ids (N,), positions (N,)."""
    N, C = x.shape
    for i in prange(N):
        token, position = ids[i], positions[i]
        for j in range(C):
            x[i, j] = wte[token, j] + wpe[position, j]


@helper(CONTRACT, inline=False)
def add_row(to, row):
    for j in range(to.size):
        to[j] += row[j]


@kernel(float2, float2, float2, int1, int1, boolean, fastmath=CONTRACT)
def embedding_backward(dwte, dwpe, dx, ids, positions, acc):
    """``spec.Kernels.embedding_backward``. A task adds all rows of dx (N,C) in order, for a block of channels, so no
    two tasks add to the same number."""
    N, C = dx.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        columns = slice(block * BLOCK, min(C, (block + 1) * BLOCK))
        if not acc:
            dwpe[:, columns] = np.float32(0.0)
        for i in range(N):
            row = dx[i, columns]
            add_row(dwte[ids[i], columns], row)
            add_row(dwpe[positions[i], columns], row)
