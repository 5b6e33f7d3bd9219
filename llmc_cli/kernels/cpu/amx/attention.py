"""``attention`` on AMX tiles: its products are of numbers rounded to bf16, its softmax and sums are float32.

A task is one head of one sequence. Scores are made transposed, in blocks (32 keys, 32 queries): so maxima, sums and
exponentials are vectors over queries, and probabilities become an operand of the next product without being turned.
The forward pass takes 32 queries against ``SPAN`` panels of keys at a time; the backward pass up to ``GROUP`` panels of
queries against one of keys, whose gradients are then summed over that many steps at once.

All memory is gone through by addresses, arrays included: those of a parallel loop are taken for apart.
"""

import math

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.amx import intrinsics, softmax
from llmc_cli.kernels.cpu.amx.panels import BLOCK, EDGE, ROW, SIDE, copy, copy_block, matrix, pack, vector
from llmc_cli.kernels.cpu.amx.softmax import LOG2_E
from llmc_cli.kernels.cpu.compiling import CONTRACT, float1, float2, helper, int64, kernel
from llmc_cli.kernels.cpu.exponential import ONE, ZERO
from llmc_cli.kernels.cpu.softmax import MASKED, dot, mask, raise_largest

SPAN = 8
GROUP = 4
STEP = 2 * intrinsics.TILE  # bytes of a step of a panel
PARTS = (0,)


def work_floats(T: int, HS: int) -> int:
    """Scratch of one worker, forward or backward, in floats."""
    panels, wide = -(-T // SIDE), -(-HS // SIDE)
    heads = panels * wide
    forward = EDGE + STEP * (2 * heads + wide + SPAN) + BLOCK * (SPAN + wide + 1) + 4 * ROW
    backward = (
        EDGE + STEP * (3 * heads + 4 * GROUP * wide + 2 * GROUP + GROUP * panels)
        + BLOCK * (2 * heads + 2 * GROUP + 2) + 2 * GROUP * ROW
    )  # fmt: skip
    return max(forward, backward) // 4


@helper(CONTRACT, inline=False)
def pack_matrix(to, panel, source, stride, along, is_b, outer, depth, edge):
    """A whole matrix of ``outer`` rows or columns and ``depth`` k; ``panel``: bytes from a panel to the next."""
    steps = (depth + SIDE - 1) // SIDE
    count = (outer + SIDE - 1) // SIDE * steps
    pack(to, panel, steps, source, stride, along, is_b, outer, depth, 0, count, edge, PARTS)


@helper(CONTRACT, inline=False)
def unpack_turned(to, stride, block, rows, columns, room):
    """Of a block of sums (columns,rows) the transpose."""
    if rows == SIDE and columns == SIDE:
        intrinsics.turn_block(to, stride, block)
    else:
        intrinsics.turn_block(room, ROW, block)
        copy(to, stride, room, ROW, rows, columns)


@helper(CONTRACT, inline=False)
def scale_columns(x, factors):
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            x[i, j] *= factors[j]


@helper(CONTRACT, inline=False)
def attend(work, out, out_stride, lse, q, k, v, stride, T, HS):
    """One head: out (T,HS) and lse (T,)."""
    scale = np.float32(1.0 / math.sqrt(HS))
    factor = scale * LOG2_E
    panels, wide = (T + SIDE - 1) // SIDE, (HS + SIDE - 1) // SIDE
    edge = work
    keys = edge + EDGE  # of a: rows are keys
    values = keys + panels * wide * STEP  # of a: rows are channels
    queries = values + panels * wide * STEP  # of b
    probabilities = queries + wide * STEP  # of b
    scores = probabilities + SPAN * STEP
    sums = scores + SPAN * BLOCK  # (channels,queries)
    room = sums + wide * BLOCK
    totals, shifts = room + BLOCK, room + BLOCK + ROW
    total, shift = vector(totals, SIDE), vector(shifts, SIDE)
    largest, shrink = vector(shifts + ROW, SIDE), vector(shifts + 2 * ROW, SIDE)
    pack_matrix(keys, wide * STEP, k, stride, True, False, T, HS, edge)
    pack_matrix(values, panels * STEP, v, stride, False, False, HS, T, edge)
    for panel in range(panels):
        first = panel * SIDE
        count = min(SIDE, T - first)
        pack_matrix(queries, wide * STEP, q + first * stride, stride, True, True, count, HS, edge)
        largest[:] = MASKED
        total[:] = ZERO
        for start in range(0, panel + 1, SPAN):
            steps = min(SPAN, panel + 1 - start)
            for i in range(steps):
                intrinsics.multiply_block(
                    scores + i * BLOCK, ROW, 0, 0, keys + (start + i) * wide * STEP, queries, wide, PARTS
                )
            if start + steps > panel:
                mask(matrix(scores + (steps - 1) * BLOCK, SIDE, SIDE), 0)
            raise_largest(matrix(scores, steps * SIDE, SIDE), largest, total, shrink, scale)
            for i in range(SIDE):
                shift[i] = -largest[i] * factor
            softmax.exponentials(probabilities, scores, steps, shifts, totals, factor)
            if start > 0:
                scale_columns(matrix(sums, wide * SIDE, SIDE), shrink)
            for i in range(wide):
                place = sums + i * BLOCK
                intrinsics.multiply_block(
                    place, ROW, place if start > 0 else 0, ROW,
                    values + (i * panels + start) * STEP, probabilities, steps, PARTS,
                )  # fmt: skip
        kept = vector(lse + first * 4, count)
        for i in range(count):
            kept[i] = largest[i] * scale + math.log(total[i])
        for i in range(SIDE):
            shrink[i] = ONE / total[i]
        scale_columns(matrix(sums, wide * SIDE, SIDE), shrink)
        for i in range(wide):
            to = out + first * out_stride + i * ROW
            unpack_turned(to, out_stride, sums + i * BLOCK, count, min(SIDE, HS - i * SIDE), room)


@kernel(float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_forward(out, lse, qkv, work, B, T, NH, HS):
    """As ``attention.attention_forward``."""
    C4 = NH * HS * 4
    at_out, at_lse, at_qkv, at_work = out.ctypes.data, lse.ctypes.data, qkv.ctypes.data, work.ctypes.data
    workers, size = work.shape
    for worker in prange(workers):
        intrinsics.configure()
        for task in range(worker, B * NH, workers):
            b, h = task // NH, task % NH
            q = at_qkv + b * T * 3 * C4 + h * HS * 4
            attend(
                at_work + worker * size * 4, at_out + b * T * C4 + h * HS * 4, C4, at_lse + task * T * 4,
                q, q + C4, q + 2 * C4, 3 * C4, T, HS,
            )  # fmt: skip
        intrinsics.release()


@helper(CONTRACT, inline=False)
def attend_backward(work, dq, dout, out, lse, q, C4, T, HS):
    """One head: its parts of the gradient of qkv, from addresses of their first numbers; ``C4``: bytes of C floats."""
    scale = np.float32(1.0 / math.sqrt(HS))
    factor = scale * LOG2_E
    panels, wide, stride = (T + SIDE - 1) // SIDE, (HS + SIDE - 1) // SIDE, 3 * C4
    edge = work
    keys = edge + EDGE  # of a: rows are keys
    values = keys + panels * wide * STEP  # of a: rows are keys
    turned = values + panels * wide * STEP  # keys, of a: rows are channels
    queries = turned + panels * wide * STEP  # of b: columns are queries
    douts = queries + GROUP * wide * STEP  # of b: columns are queries
    queries_across = douts + GROUP * wide * STEP  # of b: columns are channels
    douts_across = queries_across + GROUP * wide * STEP  # of b: columns are channels
    probabilities = douts_across + GROUP * wide * STEP  # of a: rows are keys
    gradients = probabilities + GROUP * STEP  # of scores; of a: rows are keys
    gradients_across = gradients + GROUP * STEP  # of b: columns are queries
    dkeys = gradients_across + GROUP * panels * STEP  # (keys,channels), in blocks
    dvalues = dkeys + panels * wide * BLOCK
    scores = dvalues + panels * wide * BLOCK
    dscores = scores + GROUP * BLOCK
    sums = dscores + GROUP * BLOCK
    room = sums + BLOCK
    shifts, deltas = room + BLOCK, room + BLOCK + GROUP * ROW
    shift, delta = vector(shifts, GROUP * SIDE), vector(deltas, GROUP * SIDE)
    pack_matrix(keys, wide * STEP, q + C4, stride, True, False, T, HS, edge)
    pack_matrix(values, wide * STEP, q + 2 * C4, stride, True, False, T, HS, edge)
    pack_matrix(turned, panels * STEP, q + C4, stride, False, False, HS, T, edge)
    for group in range(0, panels, GROUP):
        first, size = group * SIDE, min(GROUP, panels - group)
        count = min(GROUP * SIDE, T - first)
        here, dhere = q + first * stride, dout + first * C4
        pack_matrix(queries, wide * STEP, here, stride, True, True, count, HS, edge)
        pack_matrix(douts, wide * STEP, dhere, C4, True, True, count, HS, edge)
        pack_matrix(queries_across, GROUP * STEP, here, stride, False, True, HS, count, edge)
        pack_matrix(douts_across, GROUP * STEP, dhere, C4, False, True, HS, count, edge)
        known = vector(lse + first * 4, count)
        shift[:] = ZERO
        delta[:] = ZERO
        for i in range(count):
            shift[i] = -known[i] * LOG2_E
            delta[i] = dot(vector(dhere + i * C4, HS), vector(out + (first + i) * C4, HS))
        for panel in range(group + size):
            skipped = max(0, panel - group)  # panels of queries before the keys
            for i in range(skipped, size):
                block, dblock = scores + i * BLOCK, dscores + i * BLOCK
                a, b = panel * wide * STEP, i * wide * STEP
                intrinsics.multiply_block(block, ROW, 0, 0, keys + a, queries + b, wide, PARTS)
                intrinsics.multiply_block(dblock, ROW, 0, 0, values + a, douts + b, wide, PARTS)
                if group + i == panel:
                    mask(matrix(block, SIDE, SIDE), 0)
                softmax.score_gradients(
                    probabilities + i * STEP, gradients + i * STEP, gradients_across + (i * panels + panel) * STEP,
                    block, dblock, shifts + i * ROW, deltas + i * ROW, factor, scale,
                )  # fmt: skip
            for j in range(wide):
                place = (panel * wide + j) * BLOCK
                a, b = skipped * STEP, (j * GROUP + skipped) * STEP
                begun = panel < group
                intrinsics.multiply_block(
                    dvalues + place, ROW, dvalues + place if begun else 0, ROW,
                    probabilities + a, douts_across + b, size - skipped, PARTS,
                )  # fmt: skip
                intrinsics.multiply_block(
                    dkeys + place, ROW, dkeys + place if begun else 0, ROW,
                    gradients + a, queries_across + b, size - skipped, PARTS,
                )  # fmt: skip
        for i in range(size):
            for j in range(wide):
                across = gradients_across + i * panels * STEP
                intrinsics.multiply_block(sums, ROW, 0, 0, turned + j * panels * STEP, across, group + i + 1, PARTS)
                to = dq + (first + i * SIDE) * stride + j * ROW
                unpack_turned(to, stride, sums, min(SIDE, count - i * SIDE), min(SIDE, HS - j * SIDE), room)
    for panel in range(panels):
        for j in range(wide):
            place, to = (panel * wide + j) * BLOCK, dq + panel * SIDE * stride + j * ROW
            rows, columns = min(SIDE, T - panel * SIDE), min(SIDE, HS - j * SIDE)
            copy_block(to + C4, stride, dkeys + place, ROW, rows, columns)
            copy_block(to + 2 * C4, stride, dvalues + place, ROW, rows, columns)


@kernel(float1, float1, float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_backward(dqkv, dout, out, lse, qkv, work, B, T, NH, HS):
    """As ``attention.attention_backward``."""
    C4 = NH * HS * 4
    at_dqkv, at_dout, at_out = dqkv.ctypes.data, dout.ctypes.data, out.ctypes.data
    at_lse, at_qkv, at_work = lse.ctypes.data, qkv.ctypes.data, work.ctypes.data
    workers, size = work.shape
    for worker in prange(workers):
        intrinsics.configure()
        for task in range(worker, B * NH, workers):
            b, h = task // NH, task % NH
            at, at_q = b * T * C4 + h * HS * 4, b * T * 3 * C4 + h * HS * 4
            attend_backward(
                at_work + worker * size * 4, at_dqkv + at_q, at_dout + at, at_out + at,
                at_lse + task * T * 4, at_qkv + at_q, C4, T, HS,
            )  # fmt: skip
        intrinsics.release()
