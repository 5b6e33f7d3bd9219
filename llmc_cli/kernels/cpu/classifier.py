"""Softmax, cross-entropy and its gradient, in place over the logits."""

import math

from numba import prange

from llmc_cli.kernels.cpu.compiling import REORDER, boolean, float1, float2, float32, int1, int64, kernel
from llmc_cli.kernels.cpu.exponential import ZERO, exp, from_order_key, order_key


@kernel(float1, float2, int1, int64, float32, boolean, fastmath=REORDER)
def softmax_loss(losses, logits, targets, V, dloss, gradient):
    """losses (R,) = cross-entropy of the first V columns of logits (R,Vp), 0 for targets (R,) of -1.

    With ``gradient`` the logits become the gradient of dloss times the sum of the losses, else their contents are
    undefined. A row is read three times and stays in the second-level cache.
    """
    for i in prange(losses.size):
        target = targets[i]
        if target < 0:
            losses[i] = ZERO
            for j in range(V):
                logits[i, j] = ZERO
            continue
        key = order_key(logits[i, 0])
        for j in range(1, V):
            other = order_key(logits[i, j])
            key = other if other > key else key
        largest = from_order_key(key)
        target_logit = logits[i, target]
        total = ZERO
        for j in range(V):
            exponential = exp(logits[i, j] - largest)
            logits[i, j] = exponential
            total += exponential
        losses[i] = math.log(total) + largest - target_logit
        if gradient:
            scale = dloss / total
            for j in range(V):
                logits[i, j] *= scale
            logits[i, target] -= dloss
