"""Softmax of attention on blocks of scores (keys,queries), and its gradient."""

import numpy as np

from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, helper
from llmc_cli.kernels.cpu.exponential import ZERO, exp

MASKED = np.float32(-1e30)  # exp gives exactly 0; infinities would give NaN


@helper(CONTRACT, inline=False)
def mask(scores, first):
    """Mask the scores (keys,queries) of keys after their query. ``first``: the first key's position minus the first
    query's."""
    for i in range(scores.shape[0]):
        for j in range(min(scores.shape[1], first + i)):
            scores[i, j] = MASKED


@helper(CONTRACT, inline=False)
def update_maximum(scores, largest, total, shrink, scale):
    """Update each query's maximum so far, ``largest`` (queries,), with scores (keys,queries).

    ``shrink`` (queries,) becomes the factor that adapts sums of exponentials to the new maximum; ``total`` (queries,)
    is multiplied by it.
    """
    keys, queries = scores.shape
    for j in range(queries):
        shrink[j] = largest[j]
    for i in range(0, keys, 4):  # four rows per iteration: fewer accesses to ``largest``
        for j in range(queries):
            a, b, c, d = scores[i, j], scores[i + 1, j], scores[i + 2, j], scores[i + 3, j]
            a = a if a > b else b
            c = c if c > d else d
            a = a if a > c else c
            largest[j] = a if a > largest[j] else largest[j]
    for j in range(queries):
        shrink[j] = exp((shrink[j] - largest[j]) * scale)
        total[j] *= shrink[j]


@helper(CONTRACT, inline=False)
def softmax_block(scores, largest, total, shrink, scale):
    """Call ``update_maximum``, replace scores (keys,queries) by exponentials relative to it, and add those to ``total``
    (queries,)."""
    update_maximum(scores, largest, total, shrink, scale)
    keys, queries = scores.shape
    for i in range(keys):
        for j in range(queries):
            exponential = exp((scores[i, j] - largest[j]) * scale)
            scores[i, j] = exponential
            total[j] += exponential


@helper(CONTRACT, inline=False)
def softmax_block_backward(scores, dscores, lse, delta, scale):
    """Replace scores by probabilities, and dscores, gradients of probabilities, by gradients of scores; both
    (keys,queries). lse and delta, the sum of out · dout, are (queries,)."""
    keys, queries = scores.shape
    for i in range(keys):
        for j in range(queries):
            probability = exp(scores[i, j] * scale - lse[j])
            scores[i, j] = probability
            dscores[i, j] = probability * (dscores[i, j] - delta[j]) * scale


@helper(REORDER, inline=False)
def dot(x, y):
    total = ZERO
    for j in range(x.size):
        total += x[j] * y[j]
    return total
