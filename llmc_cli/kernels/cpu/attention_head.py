"""Causal attention of one head by blocks of queries and keys (Dao et al. 2022, arXiv:2205.14135).

The head's operands are copied into scratch memory of its worker, padded with zeros to whole tiles, so that any T and HS
go through one path. Scores are kept transposed, (keys, queries): the softmax runs along rows then, and its maxima, sums
and exponentials are vectors over queries without a sum across a vector.
"""

import math

import numpy as np

from llmc_cli.kernels.cpu.compiling import CONTRACT, helper
from llmc_cli.kernels.cpu.exponential import ONE, ZERO
from llmc_cli.kernels.cpu.register_tiles import COLUMNS, multiply
from llmc_cli.kernels.cpu.softmax import MASKED, mask, softmax_block

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
