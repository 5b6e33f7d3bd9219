"""``attention`` on AMX tiles: products of numbers rounded to bf16; softmax and sums in float32.

A task is one head of one sequence. Scores are computed transposed, in blocks (32 keys, 32 queries), so that maxima,
sums and exponentials are vectors over queries, and probabilities are an operand of the next product without being
transposed. The forward pass multiplies 32 queries with ``SPAN`` panels of keys at a time. The backward pass multiplies
up to ``GROUP`` panels of queries with one panel of keys, and sums the gradients of the keys over all of them at once.

All memory is accessed by address, arrays included: in a parallel loop LLVM assumes that arrays and addresses do not
overlap.
"""

import math
from typing import NamedTuple

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.amx import intrinsics, softmax
from llmc_cli.kernels.cpu.amx.panels import BLOCK, EDGE, ROW, SIDE, Operand, copy, copy_block, matrix, pack, vector
from llmc_cli.kernels.cpu.amx.softmax import LOG2_E
from llmc_cli.kernels.cpu.compiling import CONTRACT, float1, float2, helper, int64, kernel
from llmc_cli.kernels.cpu.exponential import ONE, ZERO
from llmc_cli.kernels.cpu.softmax import MASKED, dot, mask, update_maximum

SPAN = 8
GROUP = 4
STEP = 2 * intrinsics.TILE  # bytes of a step of a panel
PARTS = (0,)  # one bf16 part, see intrinsics.py


class Forward(NamedTuple):
    """Addresses in the scratch memory of a worker, for one head. Panels of a hold rows, panels of b columns."""

    edge: int
    keys: int  # panels of a: keys
    values: int  # panels of a: channels
    queries: int  # panel of b: 32 queries
    probabilities: int  # panel of b: 32 queries
    scores: int  # SPAN blocks (keys,queries)
    out: int  # blocks (channels,queries)
    block: int
    totals: int  # from here on 32 floats each, one for each query
    shifts: int
    largest: int
    shrink: int
    end: int


@helper(CONTRACT)
def forward_layout(start, panels, wide):
    """Lay out the scratch memory for ``panels`` panels of keys and ``wide`` blocks of channels."""
    keys = start + EDGE
    values = keys + panels * wide * STEP
    queries = values + panels * wide * STEP
    probabilities = queries + wide * STEP
    scores = probabilities + SPAN * STEP
    out = scores + SPAN * BLOCK
    block = out + wide * BLOCK
    totals = block + BLOCK
    return Forward(
        start, keys, values, queries, probabilities, scores, out, block,
        totals, totals + ROW, totals + 2 * ROW, totals + 3 * ROW, totals + 4 * ROW,
    )  # fmt: skip


class Backward(NamedTuple):
    """As ``Forward``, for the backward pass."""

    edge: int
    keys: int  # panels of a: keys
    values: int  # panels of a: keys
    keys_transposed: int  # panels of a: channels
    queries: int  # from here on up to GROUP panels of b: queries
    dout: int
    queries_transposed: int  # from here on panels of b: channels
    dout_transposed: int
    probabilities: int  # panel of a: keys
    dscores: int  # panel of a: keys
    dscores_transposed: int  # GROUP panels of b: queries
    dkeys: int  # blocks (keys,channels)
    dvalues: int
    score_blocks: int  # GROUP blocks (keys,queries)
    dscore_blocks: int
    sums: int  # block
    block: int
    shifts: int  # GROUP * 32 floats
    deltas: int
    end: int


@helper(CONTRACT)
def backward_layout(start, panels, wide):
    """As ``forward_layout``, for the backward pass."""
    keys = start + EDGE
    values = keys + panels * wide * STEP
    keys_transposed = values + panels * wide * STEP
    queries = keys_transposed + panels * wide * STEP
    dout = queries + GROUP * wide * STEP
    queries_transposed = dout + GROUP * wide * STEP
    dout_transposed = queries_transposed + GROUP * wide * STEP
    probabilities = dout_transposed + GROUP * wide * STEP
    dscores = probabilities + GROUP * STEP
    dscores_transposed = dscores + GROUP * STEP
    dkeys = dscores_transposed + GROUP * panels * STEP
    dvalues = dkeys + panels * wide * BLOCK
    score_blocks = dvalues + panels * wide * BLOCK
    dscore_blocks = score_blocks + GROUP * BLOCK
    sums = dscore_blocks + GROUP * BLOCK
    block = sums + BLOCK
    shifts = block + BLOCK
    deltas = shifts + GROUP * ROW
    return Backward(
        start, keys, values, keys_transposed, queries, dout, queries_transposed, dout_transposed, probabilities,
        dscores, dscores_transposed, dkeys, dvalues, score_blocks, dscore_blocks, sums, block, shifts, deltas,
        deltas + GROUP * ROW,
    )  # fmt: skip


def work_floats(T: int, HS: int) -> int:
    """Return the scratch memory of a worker, forward or backward, in floats."""
    panels, wide = -(-T // SIDE), -(-HS // SIDE)
    ends: tuple[int, int] = forward_layout.py_func(0, panels, wide).end, backward_layout.py_func(0, panels, wide).end
    return max(ends) // 4


@helper(CONTRACT, inline=False)
def pack_matrix(to, panel_bytes, source, is_b, outer, depth, edge):
    """Pack a whole operand of ``outer`` rows of a or columns of b and ``depth`` k."""
    count = (outer + SIDE - 1) // SIDE * ((depth + SIDE - 1) // SIDE)
    pack(to, panel_bytes, source, is_b, outer, depth, 0, count, edge, PARTS)


@helper(CONTRACT, inline=False)
def store_transposed(to, stride, block, rows, columns, scratch):
    """Store the transpose (rows,columns) of a block; ``scratch`` is another block."""
    if rows == SIDE and columns == SIDE:
        intrinsics.transpose_block(to, stride, block)
    else:
        intrinsics.transpose_block(scratch, ROW, block)
        copy(to, stride, scratch, ROW, rows, columns)


@helper(CONTRACT, inline=False)
def scale_columns(x, factors):
    rows, columns = x.shape
    for i in range(rows):
        for j in range(columns):
            x[i, j] *= factors[j]


@helper(CONTRACT, inline=False)
def head_forward(work, out, out_stride, lse, q, k, v, stride, T, HS):
    """One head: out (T,HS) and lse (T,) from q, k, v (T,HS); all but the sizes are addresses and bytes."""
    scale = np.float32(1.0 / math.sqrt(HS))
    factor = scale * LOG2_E
    panels, wide = (T + SIDE - 1) // SIDE, (HS + SIDE - 1) // SIDE
    at = forward_layout(work, panels, wide)
    total, shift = vector(at.totals, SIDE), vector(at.shifts, SIDE)
    largest, shrink = vector(at.largest, SIDE), vector(at.shrink, SIDE)
    pack_matrix(at.keys, wide * STEP, Operand(k, stride, True), False, T, HS, at.edge)
    pack_matrix(at.values, panels * STEP, Operand(v, stride, False), False, HS, T, at.edge)
    for panel in range(panels):
        first = panel * SIDE
        count = min(SIDE, T - first)
        pack_matrix(at.queries, wide * STEP, Operand(q + first * stride, stride, True), True, count, HS, at.edge)
        largest[:] = MASKED
        total[:] = ZERO
        for start in range(0, panel + 1, SPAN):
            steps = min(SPAN, panel + 1 - start)
            for i in range(steps):
                intrinsics.multiply_block(
                    at.scores + i * BLOCK, ROW, 0, 0, at.keys + (start + i) * wide * STEP, at.queries, wide, PARTS
                )
            if start + steps > panel:
                mask(matrix(at.scores + (steps - 1) * BLOCK, SIDE, SIDE), 0)
            update_maximum(matrix(at.scores, steps * SIDE, SIDE), largest, total, shrink, scale)
            for i in range(SIDE):
                shift[i] = -largest[i] * factor
            softmax.exponentials(at.probabilities, at.scores, steps, at.shifts, at.totals, factor)
            if start > 0:
                scale_columns(matrix(at.out, wide * SIDE, SIDE), shrink)
            for i in range(wide):
                place = at.out + i * BLOCK
                intrinsics.multiply_block(
                    place, ROW, place if start > 0 else 0, ROW,
                    at.values + (i * panels + start) * STEP, at.probabilities, steps, PARTS,
                )  # fmt: skip
        lses = vector(lse + first * 4, count)
        for i in range(count):
            lses[i] = largest[i] * scale + math.log(total[i])
        for i in range(SIDE):
            shrink[i] = ONE / total[i]
        scale_columns(matrix(at.out, wide * SIDE, SIDE), shrink)
        for i in range(wide):
            to = out + first * out_stride + i * ROW
            store_transposed(to, out_stride, at.out + i * BLOCK, count, min(SIDE, HS - i * SIDE), at.block)


@kernel(float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_forward(out, lse, qkv, work, B, T, NH, HS):
    """As ``attention.attention_forward`` of the float32 kernels."""
    C4 = NH * HS * 4
    at_out, at_lse, at_qkv, at_work = out.ctypes.data, lse.ctypes.data, qkv.ctypes.data, work.ctypes.data
    workers, size = work.shape
    for worker in prange(workers):
        intrinsics.configure()
        for task in range(worker, B * NH, workers):
            b, h = task // NH, task % NH
            q = at_qkv + b * T * 3 * C4 + h * HS * 4
            head_forward(
                at_work + worker * size * 4, at_out + b * T * C4 + h * HS * 4, C4, at_lse + task * T * 4,
                q, q + C4, q + 2 * C4, 3 * C4, T, HS,
            )  # fmt: skip
        intrinsics.release()


@helper(CONTRACT, inline=False)
def head_backward(work, dq, dout, out, lse, q, C4, T, HS):
    """One head: its part of the gradient of qkv. The first arguments are addresses of the head's first numbers; ``C4``
    is the bytes of C floats."""
    scale = np.float32(1.0 / math.sqrt(HS))
    factor = scale * LOG2_E
    panels, wide, stride = (T + SIDE - 1) // SIDE, (HS + SIDE - 1) // SIDE, 3 * C4
    at = backward_layout(work, panels, wide)
    shift, delta = vector(at.shifts, GROUP * SIDE), vector(at.deltas, GROUP * SIDE)
    pack_matrix(at.keys, wide * STEP, Operand(q + C4, stride, True), False, T, HS, at.edge)
    pack_matrix(at.values, wide * STEP, Operand(q + 2 * C4, stride, True), False, T, HS, at.edge)
    pack_matrix(at.keys_transposed, panels * STEP, Operand(q + C4, stride, False), False, HS, T, at.edge)
    for group in range(0, panels, GROUP):
        first, size = group * SIDE, min(GROUP, panels - group)
        count = min(GROUP * SIDE, T - first)
        here, dhere = q + first * stride, dout + first * C4
        pack_matrix(at.queries, wide * STEP, Operand(here, stride, True), True, count, HS, at.edge)
        pack_matrix(at.dout, wide * STEP, Operand(dhere, C4, True), True, count, HS, at.edge)
        pack_matrix(at.queries_transposed, GROUP * STEP, Operand(here, stride, False), True, HS, count, at.edge)
        pack_matrix(at.dout_transposed, GROUP * STEP, Operand(dhere, C4, False), True, HS, count, at.edge)
        lses = vector(lse + first * 4, count)
        shift[:] = ZERO
        delta[:] = ZERO
        for i in range(count):
            shift[i] = -lses[i] * LOG2_E
            delta[i] = dot(vector(dhere + i * C4, HS), vector(out + (first + i) * C4, HS))
        for panel in range(group + size):
            skipped = max(0, panel - group)  # panels of queries before the keys
            for i in range(skipped, size):
                block, dblock = at.score_blocks + i * BLOCK, at.dscore_blocks + i * BLOCK
                a, b = panel * wide * STEP, i * wide * STEP
                intrinsics.multiply_block(block, ROW, 0, 0, at.keys + a, at.queries + b, wide, PARTS)
                intrinsics.multiply_block(dblock, ROW, 0, 0, at.values + a, at.dout + b, wide, PARTS)
                if group + i == panel:
                    mask(matrix(block, SIDE, SIDE), 0)
                softmax.score_gradients(
                    at.probabilities + i * STEP, at.dscores + i * STEP,
                    at.dscores_transposed + (i * panels + panel) * STEP,
                    block, dblock, at.shifts + i * ROW, at.deltas + i * ROW, factor, scale,
                )  # fmt: skip
            for j in range(wide):
                dvalue, dkey = at.dvalues + (panel * wide + j) * BLOCK, at.dkeys + (panel * wide + j) * BLOCK
                a, b = skipped * STEP, (j * GROUP + skipped) * STEP
                begun = panel < group
                intrinsics.multiply_block(
                    dvalue, ROW, dvalue if begun else 0, ROW,
                    at.probabilities + a, at.dout_transposed + b, size - skipped, PARTS,
                )  # fmt: skip
                intrinsics.multiply_block(
                    dkey, ROW, dkey if begun else 0, ROW,
                    at.dscores + a, at.queries_transposed + b, size - skipped, PARTS,
                )  # fmt: skip
        for i in range(size):
            for j in range(wide):
                a, b = at.keys_transposed + j * panels * STEP, at.dscores_transposed + i * panels * STEP
                intrinsics.multiply_block(at.sums, ROW, 0, 0, a, b, group + i + 1, PARTS)
                to = dq + (first + i * SIDE) * stride + j * ROW
                rows, columns = min(SIDE, count - i * SIDE), min(SIDE, HS - j * SIDE)
                store_transposed(to, stride, at.sums, rows, columns, at.block)
    for panel in range(panels):
        for j in range(wide):
            place, to = (panel * wide + j) * BLOCK, dq + panel * SIDE * stride + j * ROW
            rows, columns = min(SIDE, T - panel * SIDE), min(SIDE, HS - j * SIDE)
            copy_block(to + C4, stride, at.dkeys + place, ROW, rows, columns)
            copy_block(to + 2 * C4, stride, at.dvalues + place, ROW, rows, columns)


@kernel(float1, float1, float1, float1, float1, float2, int64, int64, int64, int64, fastmath=CONTRACT)
def attention_backward(dqkv, dout, out, lse, qkv, work, B, T, NH, HS):
    """As ``attention.attention_backward`` of the float32 kernels."""
    C4 = NH * HS * 4
    at_dqkv, at_dout, at_out = dqkv.ctypes.data, dout.ctypes.data, out.ctypes.data
    at_lse, at_qkv, at_work = lse.ctypes.data, qkv.ctypes.data, work.ctypes.data
    workers, size = work.shape
    for worker in prange(workers):
        intrinsics.configure()
        for task in range(worker, B * NH, workers):
            b, h = task // NH, task % NH
            at, at_q = b * T * C4 + h * HS * 4, b * T * 3 * C4 + h * HS * 4
            head_backward(
                at_work + worker * size * 4, at_dqkv + at_q, at_dout + at, at_out + at,
                at_lse + task * T * 4, at_qkv + at_q, C4, T, HS,
            )  # fmt: skip
        intrinsics.release()
