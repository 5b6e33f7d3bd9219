"""Token and position embedding."""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, boolean, float2, helper, int1, kernel

BLOCK = 64  # channels a task: four cache lines of each row


@kernel(float2, float2, float2, int1, int1, fastmath=CONTRACT)
def embedding_forward(x, wte, wpe, ids, positions):
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
    """Each task owns a block of channels and walks all rows in order: no two tasks add to the same place."""
    N, C = dx.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        here = slice(block * BLOCK, min(C, (block + 1) * BLOCK))
        if not acc:
            dwpe[:, here] = np.float32(0.0)
        for i in range(N):
            row = dx[i, here]
            add_row(dwte[ids[i], here], row)
            add_row(dwpe[positions[i], here], row)
