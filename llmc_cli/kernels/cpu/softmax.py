"""What attention does with a block of scores (keys,queries), whatever multiplies them."""

import numpy as np

from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, helper
from llmc_cli.kernels.cpu.exponential import ZERO, exp

MASKED = np.float32(-1e30)  # exp makes exactly 0 of it; an infinity would become NaN


@helper(CONTRACT, inline=False)
def mask(scores, first):
    """Hide scores (keys,queries) of keys behind their query; ``first`` is the first key's position less the query's."""
    for i in range(scores.shape[0]):
        for j in range(min(scores.shape[1], first + i)):
            scores[i, j] = MASKED


@helper(CONTRACT, inline=False)
def raise_largest(scores, largest, total, shrink, scale):
    """Take scores (keys,queries) into ``largest`` (queries,), each query's largest so far. ``shrink`` (queries,)
    becomes the factor for what was summed against the one before; ``total`` (queries,) is multiplied by it."""
    keys, queries = scores.shape
    for j in range(queries):
        shrink[j] = largest[j]
    for i in range(0, keys, 4):  # four rows a turn: fewer reads and writes of ``largest``
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
    """``raise_largest``, and turn scores into exponentials against that, which are added to ``total``."""
    raise_largest(scores, largest, total, shrink, scale)
    keys, queries = scores.shape
    for i in range(keys):
        for j in range(queries):
            exponential = exp((scores[i, j] - largest[j]) * scale)
            scores[i, j] = exponential
            total[j] += exponential


@helper(CONTRACT, inline=False)
def softmax_block_backward(scores, dscores, lse, delta, scale):
    """Scores and gradients of probabilities (keys,queries) become probabilities and gradients of scores."""
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
