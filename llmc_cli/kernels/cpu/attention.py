"""Causal attention by blocks of queries and keys, scores recomputed in backward (Dao et al. 2022, arXiv:2205.14135).

A task is one head of one sequence. It copies its operands into scratch memory of its worker, padded with zeros to whole
tiles, so that any T and HS go through one path. Scores are kept transposed, (keys, queries): the softmax runs along
rows then, and its maxima, sums and exponentials are vectors over queries without a sum across a vector.
"""

import math

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, float1, float2, helper, int1, int64, kernel
from llmc_cli.kernels.cpu.exponential import ONE, ZERO, exp
from llmc_cli.kernels.cpu.tiles import COLUMNS, multiply

QUERIES = 32  # a block; multiples of tiles.COLUMNS and tiles.ROWS
KEYS = 64
MASKED = np.float32(-1e30)  # exp makes exactly 0 of it; an infinity would become NaN


def padded(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def work_floats(T: int, length: int, HS: int) -> int:
    """Scratch of one worker for T queries and ``length`` keys, forward or backward, in floats."""
    wide = padded(HS, COLUMNS)
    return 4 * (length + 2 * QUERIES) * wide + 6 * QUERIES * wide + 2 * KEYS * QUERIES + 4 * QUERIES


@helper(CONTRACT, inline=False)
def pack(to, at, ld, rows, source, start, stride, count, size):  # type: ignore[no-untyped-def]
    """(rows,ld) at ``at`` = ``count`` rows of ``size`` numbers from ``source``, zeros around them."""
    for i in range(rows):
        stop = size if i < count else 0
        for j in range(stop):
            to[at + i * ld + j] = source[start + i * stride + j]
        for j in range(stop, ld):
            to[at + i * ld + j] = ZERO


@helper(CONTRACT, inline=False)
def transpose(to, at, source, start, ld, size):  # type: ignore[no-untyped-def]
    """(size,QUERIES) at ``at`` = the transpose of (QUERIES,size)."""
    for j in range(size):
        for i in range(QUERIES):
            to[at + j * QUERIES + i] = source[start + i * ld + j]


@helper(CONTRACT, inline=False)
def mask(work, at, rows, first):  # type: ignore[no-untyped-def]
    """Hide scores (rows,QUERIES) of keys behind their query; ``first`` is the first key's position less the query's."""
    for i in range(max(0, 1 - first), rows):
        for j in range(min(QUERIES, first + i)):
            work[at + i * QUERIES + j] = MASKED


@helper(REORDER, inline=False)
def softmax_block(work, scores, rows, largest, total, shrink, scale):  # type: ignore[no-untyped-def]
    """Turn scores (rows,QUERIES) into exponentials against the largest so far; ``largest``, ``total`` and ``shrink``
    (QUERIES,) are each query's largest score, sum of exponentials, and factor for what was summed before."""
    for j in range(QUERIES):
        work[shrink + j] = work[largest + j]
    for i in range(rows):
        for j in range(QUERIES):
            score, best = work[scores + i * QUERIES + j], work[largest + j]
            work[largest + j] = score if score > best else best
    for j in range(QUERIES):
        work[shrink + j] = exp((work[shrink + j] - work[largest + j]) * scale)
        work[total + j] *= work[shrink + j]
    for i in range(rows):
        for j in range(QUERIES):
            exponential = exp((work[scores + i * QUERIES + j] - work[largest + j]) * scale)
            work[scores + i * QUERIES + j] = exponential
            work[total + j] += exponential


@helper(CONTRACT, inline=False)
def attend(work, out, at_out, out_stride, lse, at_lse, q, at_q, q_stride, T, k, at_k, v, at_v, kv_stride, length, HS):  # type: ignore[no-untyped-def]
    """One head: out (T,HS), lse (T,) of T queries that are the last of ``length`` keys and values."""
    scale = np.float32(1.0 / math.sqrt(HS))
    wide = (HS + COLUMNS - 1) // COLUMNS * COLUMNS
    before = length - T
    rows = length + 2 * QUERIES  # the last block may reach beyond
    keys, values = 0, rows * wide
    block = 2 * rows * wide
    turned, summed = block + QUERIES * wide, block + 2 * QUERIES * wide
    scores = summed + QUERIES * wide
    largest = scores + KEYS * QUERIES
    total, shrink = largest + QUERIES, largest + 2 * QUERIES
    pack(work, keys, wide, rows, k, at_k, kv_stride, length, HS)
    pack(work, values, wide, rows, v, at_v, kv_stride, length, HS)
    for first in range(0, T, QUERIES):
        pack(work, block, wide, QUERIES, q, at_q + first * q_stride, q_stride, T - first, HS)
        transpose(work, turned, work, block, wide, HS)
        for j in range(QUERIES):
            work[largest + j], work[total + j] = MASKED, ZERO
        for i in range(QUERIES * wide):
            work[summed + i] = ZERO
        stop = before + first + QUERIES  # behind the last key that the block sees, rounded up to whole tiles
        stop = (stop + QUERIES - 1) // QUERIES * QUERIES
        for key in range(0, stop, KEYS):
            count = min(KEYS, stop - key)
            multiply(
                work,
                scores,
                QUERIES,
                work,
                keys + key * wide,
                wide,
                1,
                work,
                turned,
                QUERIES,
                count,
                QUERIES,
                HS,
                False,
            )
            if key + count > before + first + 1:
                mask(work, scores, count, key - before - first)
            softmax_block(work, scores, count, largest, total, shrink, scale)
            if key > 0:
                for i in range(QUERIES):
                    for j in range(wide):
                        work[summed + i * wide + j] *= work[shrink + i]
            multiply(
                work,
                summed,
                wide,
                work,
                scores,
                1,
                QUERIES,
                work,
                values + key * wide,
                wide,
                QUERIES,
                wide,
                count,
                True,
            )
        for i in range(min(QUERIES, T - first)):
            inverse = ONE / work[total + i]
            for j in range(HS):
                out[at_out + (first + i) * out_stride + j] = work[summed + i * wide + j] * inverse
            lse[at_lse + first + i] = work[largest + i] * scale + math.log(work[total + i])


@kernel(float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_forward(out, lse, qkv, work, B, T, NH, HS):  # type: ignore[no-untyped-def]
    """out (B,T,C), lse (B,NH,T), qkv (B,T,3C), flat; ``work`` has a row for each worker."""
    C = NH * HS
    for worker in prange(work.shape[0]):
        for task in range(worker, B * NH, work.shape[0]):
            b, h = task // NH, task % NH
            at = b * T * 3 * C + h * HS
            attend(
                work[worker], out, b * T * C + h * HS, C, lse, task * T,
                qkv, at, 3 * C, T, qkv, at + C, qkv, at + 2 * C, 3 * C, T, HS,
            )  # fmt: skip


@helper(CONTRACT, inline=False)
def backward_block(work, scores, dscores, rows, lse, delta, scale):  # type: ignore[no-untyped-def]
    """Scores and gradients of probabilities (rows,QUERIES) become probabilities and gradients of scores."""
    for i in range(rows):
        for j in range(QUERIES):
            at = i * QUERIES + j
            probability = exp(work[scores + at] * scale - work[lse + j])
            work[scores + at] = probability
            work[dscores + at] = probability * (work[dscores + at] - work[delta + j]) * scale


@helper(REORDER, inline=False)
def dot(x, at_x, y, at_y, size):  # type: ignore[no-untyped-def]
    total = ZERO
    for j in range(size):
        total += x[at_x + j] * y[at_y + j]
    return total


@helper(CONTRACT, inline=False)
def attend_backward(work, dqkv, dout, out, lse, qkv, at_lse, at_out, at_qkv, T, C, HS):  # type: ignore[no-untyped-def]
    """One head: its parts of dqkv (B,T,3C)."""
    scale = np.float32(1.0 / math.sqrt(HS))
    wide = (HS + COLUMNS - 1) // COLUMNS * COLUMNS
    rows = T + 2 * QUERIES
    keys, values, dkeys, dvalues = 0, rows * wide, 2 * rows * wide, 3 * rows * wide
    block = 4 * rows * wide
    turned, dblock, dturned = block + QUERIES * wide, block + 2 * QUERIES * wide, block + 3 * QUERIES * wide
    dqueries = block + 4 * QUERIES * wide
    scores = dqueries + QUERIES * wide
    dscores = scores + KEYS * QUERIES
    lses, deltas = dscores + KEYS * QUERIES, dscores + KEYS * QUERIES + QUERIES
    pack(work, keys, wide, rows, qkv, at_qkv + C, 3 * C, T, HS)
    pack(work, values, wide, rows, qkv, at_qkv + 2 * C, 3 * C, T, HS)
    for i in range(2 * rows * wide):
        work[dkeys + i] = ZERO
    for first in range(0, T, QUERIES):
        count = min(QUERIES, T - first)
        pack(work, block, wide, QUERIES, qkv, at_qkv + first * 3 * C, 3 * C, count, HS)
        pack(work, dblock, wide, QUERIES, dout, at_out + first * C, C, count, HS)
        transpose(work, turned, work, block, wide, HS)
        transpose(work, dturned, work, dblock, wide, HS)
        for i in range(QUERIES):
            work[lses + i], work[deltas + i] = ZERO, ZERO
        for i in range(count):
            at = at_out + (first + i) * C
            work[lses + i], work[deltas + i] = lse[at_lse + first + i], dot(dout, at, out, at, HS)
        for i in range(QUERIES * wide):
            work[dqueries + i] = ZERO
        stop = first + QUERIES
        for key in range(0, stop, KEYS):
            n, at_key = min(KEYS, stop - key), key * wide
            multiply(work, scores, QUERIES, work, keys + at_key, wide, 1, work, turned, QUERIES, n, QUERIES, HS, False)
            multiply(
                work, dscores, QUERIES, work, values + at_key, wide, 1, work, dturned, QUERIES, n, QUERIES, HS, False
            )
            if key + n > first + 1:
                mask(work, scores, n, key - first)
            backward_block(work, scores, dscores, n, lses, deltas, scale)
            multiply(work, dvalues + at_key, wide, work, scores, QUERIES, 1, work, dblock, wide, n, wide, QUERIES, True)
            multiply(work, dkeys + at_key, wide, work, dscores, QUERIES, 1, work, block, wide, n, wide, QUERIES, True)
            multiply(work, dqueries, wide, work, dscores, 1, QUERIES, work, keys + at_key, wide, QUERIES, wide, n, True)
        for i in range(count):
            for j in range(HS):
                dqkv[at_qkv + (first + i) * 3 * C + j] = work[dqueries + i * wide + j]
    for i in range(T):
        for j in range(HS):
            dqkv[at_qkv + i * 3 * C + C + j] = work[dkeys + i * wide + j]
            dqkv[at_qkv + i * 3 * C + 2 * C + j] = work[dvalues + i * wide + j]


@kernel(float1, float1, float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_backward(dqkv, dout, out, lse, qkv, work, B, T, NH, HS):  # type: ignore[no-untyped-def]
    C = NH * HS
    for worker in prange(work.shape[0]):
        for task in range(worker, B * NH, work.shape[0]):
            b, h = task // NH, task % NH
            attend_backward(
                work[worker], dqkv, dout, out, lse, qkv, task * T, b * T * C + h * HS, b * T * 3 * C + h * HS, T, C, HS
            )


@helper(REORDER, inline=False)
def attend_once(work, out, at_out, q, at_q, k, v, at_kv, length, HS):  # type: ignore[no-untyped-def]
    """One head, one query: out (HS,) from ``length`` keys and values, read where they are."""
    scale = np.float32(1.0 / math.sqrt(HS))
    largest, total = MASKED, ZERO
    for i in range(length):
        score = dot(q, at_q, k, at_kv + i * HS, HS) * scale
        work[i] = score
        largest = score if score > largest else largest
    for i in range(length):
        work[i] = exp(work[i] - largest)
        total += work[i]
    for j in range(HS):
        out[at_out + j] = ZERO
    for i in range(length):
        probability = work[i] / total
        for j in range(HS):
            out[at_out + j] += probability * v[at_kv + i * HS + j]


@kernel(float1, float1, float1, float1, int1, float2, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_cached(out, keys, values, qkv, lengths, work, lse, T, Tmax, NH, HS):  # type: ignore[no-untyped-def]
    """out (S,T,C), keys and values (S,NH,Tmax,HS), qkv (S,T,3C), flat; ``lse`` is scratch like ``work``."""
    C = NH * HS
    for worker in prange(work.shape[0]):
        for task in range(worker, lengths.size * NH, work.shape[0]):
            s, h = task // NH, task % NH
            start, cache = lengths[s], task * Tmax * HS
            at_qkv, at_out = s * T * 3 * C + h * HS, s * T * C + h * HS
            for i in range(T):
                for j in range(HS):
                    keys[cache + (start + i) * HS + j] = qkv[at_qkv + i * 3 * C + C + j]
                    values[cache + (start + i) * HS + j] = qkv[at_qkv + i * 3 * C + 2 * C + j]
            if T == 1:
                attend_once(work[worker], out, at_out, qkv, at_qkv, keys, values, cache, start + 1, HS)
            else:
                attend(
                    work[worker], out, at_out, C, lse[worker], 0,
                    qkv, at_qkv, 3 * C, T, keys, cache, values, cache, HS, start + T, HS,
                )  # fmt: skip
