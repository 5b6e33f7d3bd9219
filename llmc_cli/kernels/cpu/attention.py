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
from llmc_cli.kernels.cpu.softmax import MASKED, dot, mask, softmax_block, softmax_block_backward
from llmc_cli.kernels.cpu.tiles import COLUMNS, multiply

QUERIES = 32  # a block; multiples of tiles.COLUMNS, tiles.ROWS and 4
KEYS = 64


def work_floats(length: int, HS: int) -> int:
    """Scratch of one worker for ``length`` keys, forward or backward, in floats."""
    wide = -(-HS // COLUMNS) * COLUMNS
    return 4 * (length + 2 * QUERIES) * wide + 5 * QUERIES * wide + 2 * KEYS * QUERIES + 3 * QUERIES


@helper(CONTRACT)
def take(work, start, rows, columns):
    """A matrix in the flat array ``work``, and where the next one may start."""
    stop = start + rows * columns
    return work[start:stop].reshape((rows, columns)), stop


@helper(CONTRACT, inline=False)
def pack(to, source, start, stride, count, size):
    """``to`` (rows,columns) = ``count`` rows of ``size`` numbers, ``stride`` apart in ``source``, zeros around them."""
    rows, columns = to.shape
    count = min(count, rows)
    for i in range(count):
        row = source[start + i * stride : start + i * stride + size]
        for j in range(size):
            to[i, j] = row[j]
        for j in range(size, columns):
            to[i, j] = ZERO
    for i in range(count, rows):
        for j in range(columns):
            to[i, j] = ZERO


@helper(CONTRACT, inline=False)
def unpack(to, start, stride, source, count, size):
    """The other way: ``count`` rows of ``size`` numbers, ``stride`` apart in ``to``, from ``source`` (rows,columns)."""
    for i in range(count):
        row = to[start + i * stride : start + i * stride + size]
        for j in range(size):
            row[j] = source[i, j]


@helper(CONTRACT, inline=False)
def transpose(to, source):
    for j in range(to.shape[0]):
        for i in range(to.shape[1]):
            to[j, i] = source[i, j]


@helper(CONTRACT, inline=False)
def scale_rows(x, factors):
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            x[i, j] *= factors[i]


@helper(CONTRACT, inline=False)
def attend(work, out, at_out, out_stride, lse, at_lse, q, at_q, q_stride, T, k, at_k, v, at_v, kv_stride, length, HS):
    """One head: out (T,HS), lse (T,) of T queries that are the last of ``length`` keys and values."""
    scale = np.float32(1.0 / math.sqrt(HS))
    wide = (HS + COLUMNS - 1) // COLUMNS * COLUMNS
    before = length - T
    keys, end = take(work, 0, length + 2 * QUERIES, wide)  # the last block may reach beyond
    values, end = take(work, end, length + 2 * QUERIES, wide)
    queries, end = take(work, end, QUERIES, wide)
    turned, end = take(work, end, wide, QUERIES)
    summed, end = take(work, end, QUERIES, wide)
    scores, end = take(work, end, KEYS, QUERIES)
    statistics, end = take(work, end, 3, QUERIES)
    largest, total, shrink = statistics[0], statistics[1], statistics[2]
    pack(keys, k, at_k, kv_stride, length, HS)
    pack(values, v, at_v, kv_stride, length, HS)
    for first in range(0, T, QUERIES):
        count = min(QUERIES, T - first)
        pack(queries, q, at_q + first * q_stride, q_stride, count, HS)
        transpose(turned, queries)
        largest[:] = MASKED
        total[:] = ZERO
        # behind the last key that the block sees, in whole blocks
        stop = (before + first + 2 * QUERIES - 1) // QUERIES * QUERIES
        for key in range(0, stop, KEYS):
            n = min(KEYS, stop - key)
            block = scores[:n]
            multiply(block, keys[key : key + n], turned, HS, False, False)
            if key + n > before + first + 1:
                mask(block, key - before - first)
            softmax_block(block, largest, total, shrink, scale)
            if key > 0:
                scale_rows(summed, shrink)
            multiply(summed, block, values[key : key + n], n, True, key > 0)
        for i in range(count):
            lse[at_lse + first + i] = largest[i] * scale + math.log(total[i])
            shrink[i] = ONE / total[i]
        scale_rows(summed[:count], shrink)
        unpack(out, at_out + first * out_stride, out_stride, summed, count, HS)


@kernel(float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_forward(out, lse, qkv, work, B, T, NH, HS):
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
def attend_backward(work, dqkv, dout, out, lse, qkv, at_lse, at_out, at_qkv, T, C, HS):
    """One head: its parts of dqkv (B,T,3C)."""
    scale = np.float32(1.0 / math.sqrt(HS))
    wide = (HS + COLUMNS - 1) // COLUMNS * COLUMNS
    keys, end = take(work, 0, T + 2 * QUERIES, wide)
    values, end = take(work, end, T + 2 * QUERIES, wide)
    dkeys, end = take(work, end, T + 2 * QUERIES, wide)
    dvalues, end = take(work, end, T + 2 * QUERIES, wide)
    queries, end = take(work, end, QUERIES, wide)
    turned, end = take(work, end, wide, QUERIES)
    douts, end = take(work, end, QUERIES, wide)
    dturned, end = take(work, end, wide, QUERIES)
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
        transpose(turned, queries)
        transpose(dturned, douts)
        statistics[:] = ZERO
        for i in range(count):
            at = at_out + (first + i) * C
            lses[i] = lse[at_lse + first + i]
            deltas[i] = dot(dout[at : at + HS], out[at : at + HS])
        stop = first + QUERIES
        for key in range(0, stop, KEYS):
            n = min(KEYS, stop - key)
            block, dblock, here = scores[:n], dscores[:n], slice(key, key + n)
            multiply(block, keys[here], turned, HS, False, False)
            multiply(dblock, values[here], dturned, HS, False, False)
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
    C = NH * HS
    for worker in prange(work.shape[0]):
        for task in range(worker, B * NH, work.shape[0]):
            b, h = task // NH, task % NH
            attend_backward(
                work[worker], dqkv, dout, out, lse, qkv, task * T, b * T * C + h * HS, b * T * 3 * C + h * HS, T, C, HS
            )


@helper(REORDER, inline=False)
def attend_once(scores, out, q, k, v):
    """One head, one query q (HS,): out (HS,) from k and v (length,HS), read where they are."""
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
    """out (S,T,C), keys and values (S,NH,Tmax,HS), qkv (S,T,3C), flat; ``lse`` is scratch like ``work``."""
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
                attend_once(work[worker], out[at_out : at_out + HS], qkv[at_qkv : at_qkv + HS], k, v)
            else:
                attend(
                    work[worker], out, at_out, C, lse[worker], 0,
                    qkv, at_qkv, 3 * C, T, keys, start, values, start, HS, before + T, HS,
                )  # fmt: skip
