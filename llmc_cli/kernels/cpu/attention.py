"""Causal attention for training: one task per head and sequence. The backward pass recomputes the scores."""

import math

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.attention_head import (
    KEYS,
    QUERIES,
    head_forward,
    pack,
    take,
    transpose,
    unpack,
)
from llmc_cli.kernels.cpu.attention_head import (
    work_floats as work_floats,
)
from llmc_cli.kernels.cpu.compiling import CONTRACT, float1, float2, helper, int64, kernel
from llmc_cli.kernels.cpu.exponential import ZERO
from llmc_cli.kernels.cpu.register_tiles import COLUMNS, multiply
from llmc_cli.kernels.cpu.softmax import dot, mask, softmax_block_backward


@kernel(float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_forward(out, lse, qkv, work, B, T, NH, HS):
    """``spec.Kernels.attention_forward`` on flat arrays: out (B,T,C), lse (B,NH,T), qkv (B,T,3C). ``work`` is scratch
    memory with one row per worker."""
    C = NH * HS
    for worker in prange(work.shape[0]):
        for task in range(worker, B * NH, work.shape[0]):
            b, h = task // NH, task % NH
            at = b * T * 3 * C + h * HS
            head_forward(
                work[worker], out, b * T * C + h * HS, C, lse, task * T,
                qkv, at, 3 * C, T, qkv, at + C, qkv, at + 2 * C, 3 * C, T, HS,
            )  # fmt: skip


@helper(CONTRACT, inline=False)
def head_backward(work, dqkv, dout, out, lse, qkv, at_lse, at_out, at_qkv, T, C, HS):
    """One head: its part of dqkv (B,T,3C). ``at_*`` are the offsets of the head's first numbers in the flat arrays."""
    scale = np.float32(1.0 / math.sqrt(HS))
    wide = (HS + COLUMNS - 1) // COLUMNS * COLUMNS
    keys, end = take(work, 0, T + 2 * QUERIES, wide)
    values, end = take(work, end, T + 2 * QUERIES, wide)
    dkeys, end = take(work, end, T + 2 * QUERIES, wide)
    dvalues, end = take(work, end, T + 2 * QUERIES, wide)
    queries, end = take(work, end, QUERIES, wide)
    queries_transposed, end = take(work, end, wide, QUERIES)
    douts, end = take(work, end, QUERIES, wide)
    dout_transposed, end = take(work, end, wide, QUERIES)
    dqueries, end = take(work, end, QUERIES, wide)
    scores, end = take(work, end, KEYS, QUERIES)
    dscores, end = take(work, end, KEYS, QUERIES)
    statistics, end = take(work, end, 2, QUERIES)
    lses, deltas = statistics[0], statistics[1]
    pack(keys, qkv, at_qkv + C, 3 * C, T, HS)
    pack(values, qkv, at_qkv + 2 * C, 3 * C, T, HS)
    dkeys[:] = ZERO
    dvalues[:] = ZERO
    for first in range(0, T, QUERIES):
        count = min(QUERIES, T - first)
        pack(queries, qkv, at_qkv + first * 3 * C, 3 * C, count, HS)
        pack(douts, dout, at_out + first * C, C, count, HS)
        transpose(queries_transposed, queries)
        transpose(dout_transposed, douts)
        statistics[:] = ZERO
        for i in range(count):
            at = at_out + (first + i) * C
            lses[i] = lse[at_lse + first + i]
            deltas[i] = dot(dout[at : at + HS], out[at : at + HS])
        stop = first + QUERIES
        for key in range(0, stop, KEYS):
            n = min(KEYS, stop - key)
            block, dblock, here = scores[:n], dscores[:n], slice(key, key + n)
            multiply(block, keys[here], queries_transposed, HS, False, False)
            multiply(dblock, values[here], dout_transposed, HS, False, False)
            if key + n > first + 1:
                mask(block, key - first)
            softmax_block_backward(block, dblock, lses, deltas, scale)
            multiply(dvalues[here], block, douts, QUERIES, False, True)
            multiply(dkeys[here], dblock, queries, QUERIES, False, True)
            multiply(dqueries, dblock, keys[here], n, True, key > 0)
        unpack(dqkv, at_qkv + first * 3 * C, 3 * C, dqueries, count, HS)
    unpack(dqkv, at_qkv + C, 3 * C, dkeys, T, HS)
    unpack(dqkv, at_qkv + 2 * C, 3 * C, dvalues, T, HS)


@kernel(float1, float1, float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_backward(dqkv, dout, out, lse, qkv, work, B, T, NH, HS):
    """``spec.Kernels.attention_backward`` on flat arrays, shaped as in ``attention_forward``."""
    C = NH * HS
    for worker in prange(work.shape[0]):
        for task in range(worker, B * NH, work.shape[0]):
            b, h = task // NH, task % NH
            head_backward(
                work[worker], dqkv, dout, out, lse, qkv, task * T, b * T * C + h * HS, b * T * 3 * C + h * HS, T, C, HS
            )
