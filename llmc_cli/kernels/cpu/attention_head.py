"""Causal attention of one head by blocks of queries and keys (Dao et al. 2022, arXiv:2205.14135).

The head's operands are copied into the worker's scratch memory and padded with zeros to whole tiles, so one code path
serves any T and HS. Scores are stored transposed, (keys,queries), so that maxima, sums and exponentials are vectors
over queries, and no sum runs across a vector.
"""

import math

import numpy as np

from llmc_cli.kernels.cpu.compiling import CONTRACT, helper
from llmc_cli.kernels.cpu.exponential import ONE, ZERO
from llmc_cli.kernels.cpu.register_tiles import COLUMNS, multiply
from llmc_cli.kernels.cpu.softmax import MASKED, mask, softmax_block

QUERIES = 32  # per block; this and KEYS are multiples of register_tiles.COLUMNS and ROWS, and of 4
KEYS = 64


def work_floats(length: int, HS: int) -> int:
    """Return the scratch memory of a worker for ``length`` keys, forward or backward, in floats."""
    wide = -(-HS // COLUMNS) * COLUMNS
    return 4 * (length + 2 * QUERIES) * wide + 5 * QUERIES * wide + 2 * KEYS * QUERIES + 3 * QUERIES


@helper(CONTRACT)
def take(work, start, rows, columns):
    """Return a matrix from the flat array ``work``, and the offset after it."""
    stop = start + rows * columns
    return work[start:stop].reshape((rows, columns)), stop


@helper(CONTRACT, inline=False)
def pack(to, source, start, stride, count, size):
    """to (rows,columns) = ``count`` rows of ``size`` numbers, ``stride`` apart in ``source``, padded with zeros."""
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
    """The inverse of ``pack``: write ``count`` rows of ``size`` numbers, ``stride`` apart in ``to``."""
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
def head_forward(
    work, out, at_out, out_stride, lse, at_lse, q, at_q, q_stride, T, k, at_k, v, at_v, kv_stride, length, HS
):
    """One head: out (T,HS) and lse (T,) of T queries, the last of ``length`` positions with keys and values.

    The arrays are flat: ``at_*`` are the offsets of the head's first numbers, ``*_stride`` the distances of positions.
    """
    scale = np.float32(1.0 / math.sqrt(HS))
    wide = (HS + COLUMNS - 1) // COLUMNS * COLUMNS
    before = length - T
    keys, end = take(work, 0, length + 2 * QUERIES, wide)  # the last block may end after the last key
    values, end = take(work, end, length + 2 * QUERIES, wide)
    queries, end = take(work, end, QUERIES, wide)
    queries_transposed, end = take(work, end, wide, QUERIES)
    summed, end = take(work, end, QUERIES, wide)
    scores, end = take(work, end, KEYS, QUERIES)
    statistics, end = take(work, end, 3, QUERIES)
    largest, total, shrink = statistics[0], statistics[1], statistics[2]
    pack(keys, k, at_k, kv_stride, length, HS)
    pack(values, v, at_v, kv_stride, length, HS)
    for first in range(0, T, QUERIES):
        count = min(QUERIES, T - first)
        pack(queries, q, at_q + first * q_stride, q_stride, count, HS)
        transpose(queries_transposed, queries)
        largest[:] = MASKED
        total[:] = ZERO
        # the end of the keys that the block attends to, in whole blocks
        stop = (before + first + 2 * QUERIES - 1) // QUERIES * QUERIES
        for key in range(0, stop, KEYS):
            n = min(KEYS, stop - key)
            block = scores[:n]
            multiply(block, keys[key : key + n], queries_transposed, HS, False, False)
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
