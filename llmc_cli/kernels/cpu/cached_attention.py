"""Attention of new tokens to cached keys and values: one task per head and sequence."""

import math

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.attention_head import head_forward, pack, take
from llmc_cli.kernels.cpu.attention_head import work_floats as work_floats
from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, float1, float2, helper, int1, int64, kernel
from llmc_cli.kernels.cpu.exponential import ZERO, exp
from llmc_cli.kernels.cpu.softmax import MASKED, dot


@helper(REORDER, inline=False)
def single_query(scores, out, q, k, v):
    """One head and one query q (HS,): out (HS,) from k and v (length,HS), read in place; ``scores`` is scratch."""
    length, HS = k.shape
    scale = np.float32(1.0 / math.sqrt(HS))
    largest, total = MASKED, ZERO
    for i in range(length):
        scores[i] = dot(q, k[i]) * scale
        largest = scores[i] if scores[i] > largest else largest
    for i in range(length):
        exponential = exp(scores[i] - largest)
        scores[i] = exponential
        total += exponential
    for j in range(HS):
        out[j] = ZERO
    for i in range(length):
        probability = scores[i] / total
        for j in range(HS):
            out[j] += probability * v[i, j]


@kernel(float1, float1, float1, float1, int1, float2, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_cached(out, keys, values, qkv, lengths, work, lse, T, Tmax, NH, HS):
    """``spec.Kernels.attention_cached`` on flat arrays: out (S,T,C), keys and values (S,NH,Tmax,HS), qkv (S,T,3C).
    ``work`` and ``lse`` are scratch memory with one row per worker."""
    C = NH * HS
    for worker in prange(work.shape[0]):
        for task in range(worker, lengths.size * NH, work.shape[0]):
            s, h = task // NH, task % NH
            before, start = lengths[s], task * Tmax * HS
            at_qkv, at_out = s * T * 3 * C + h * HS, s * T * C + h * HS
            k, _ = take(keys, start, before + T, HS)
            v, _ = take(values, start, before + T, HS)
            pack(k[before:], qkv, at_qkv + C, 3 * C, T, HS)
            pack(v[before:], qkv, at_qkv + 2 * C, 3 * C, T, HS)
            if T == 1:
                single_query(work[worker], out[at_out : at_out + HS], qkv[at_qkv : at_qkv + HS], k, v)
            else:
                head_forward(
                    work[worker], out, at_out, C, lse[worker], 0,
                    qkv, at_qkv, 3 * C, T, keys, start, values, start, HS, before + T, HS,
                )  # fmt: skip
