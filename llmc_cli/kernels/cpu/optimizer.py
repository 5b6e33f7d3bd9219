"""The sum of squares of the gradients, and AdamW."""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, double1, float1, float64, helper, kernel, long2

PIECE = 16384  # elements per task


@helper(REORDER, inline=False)
def piece_sum(g):
    total = 0.0
    for i in range(g.size):
        x = np.float64(g[i])
        total += x * x
    return total


@kernel(double1, double1, float1, fastmath=CONTRACT)
def sum_squares(out, pieces, g):
    """out (1,) = the sum of the squares of g (P,); ``pieces`` is scratch memory for the sum of each piece."""
    count = pieces.size
    length = (g.size + count - 1) // count
    for piece in prange(count):
        pieces[piece] = piece_sum(g[piece * length : (piece + 1) * length])
    total = 0.0
    for piece in range(count):
        total += pieces[piece]
    out[0] = total


@helper(CONTRACT, inline=False)
def adamw_piece(master, m, v, g, hyper, decays, scale):
    lr, eps, decay, clip = np.float32(hyper[0]), np.float32(hyper[3]), np.float32(hyper[4] * decays), np.float32(scale)
    beta1, beta2 = np.float32(hyper[1]), np.float32(hyper[2])
    rest1, rest2 = np.float32(1.0 - hyper[1]), np.float32(1.0 - hyper[2])
    inverse1, inverse2 = np.float32(1.0 / hyper[5]), np.float32(1.0 / hyper[6])
    for i in range(g.size):
        gradient = clip * g[i]
        first = beta1 * m[i] + rest1 * gradient
        second = beta2 * v[i] + rest2 * (gradient * gradient)
        m[i], v[i] = first, second
        step = (first * inverse1) / (np.sqrt(second * inverse2) + eps)
        master[i] -= lr * (step + decay * master[i])


@kernel(float1, float1, float1, float1, long2, double1, float64, fastmath=CONTRACT)
def adamw(master, m, v, g, segments, hyper, scale):
    """``spec.Kernels.adamw`` in one pass over master, m, v, g (P,). hyper[7], the maximum norm, is not used: ``scale``
    is the clipping factor. A task updates the parts of the segments (offset, length, decay) that lie in its piece."""
    for piece in prange((g.size + PIECE - 1) // PIECE):
        for k in range(segments.shape[0]):
            start = max(piece * PIECE, segments[k, 0])
            stop = min((piece + 1) * PIECE, segments[k, 0] + segments[k, 1])
            if start < stop:
                here = slice(start, stop)
                adamw_piece(master[here], m[here], v[here], g[here], hyper, segments[k, 2], scale)
