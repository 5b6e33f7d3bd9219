"""Token and position embedding."""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, boolean, float2, int1, kernel

BLOCK = 64  # channels a task: four cache lines of each row


@kernel(float2, float2, float2, int1, int1, fastmath=CONTRACT)
def embedding_forward(x, wte, wpe, ids, positions):  # type: ignore[no-untyped-def]
    N, C = x.shape
    for i in prange(N):
        token, position = ids[i], positions[i]
        for j in range(C):
            x[i, j] = wte[token, j] + wpe[position, j]


@kernel(float2, float2, float2, int1, int1, boolean, fastmath=CONTRACT)
def embedding_backward(dwte, dwpe, dx, ids, positions, acc):  # type: ignore[no-untyped-def]
    """Each task owns a block of channels and walks all rows in order: no two tasks add to the same place."""
    N, C = dx.shape
    for block in prange((C + BLOCK - 1) // BLOCK):
        start, stop = block * BLOCK, min(C, (block + 1) * BLOCK)
        if not acc:
            for i in range(dwpe.shape[0]):
                for j in range(start, stop):
                    dwpe[i, j] = np.float32(0.0)
        for i in range(N):
            token, position = ids[i], positions[i]
            for j in range(start, stop):
                dwte[token, j] += dx[i, j]
            for j in range(start, stop):
                dwpe[position, j] += dx[i, j]
