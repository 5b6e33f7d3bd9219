"""The softmax between two products on AMX tiles: from blocks of scores to panels of bf16, in vector registers.

Exponentials are powers of two: 2^t with t = score · factor + shift, where ``factor`` is log2(e) times the scale of the
scores. So each takes one multiplication for the scaling, a polynomial, and an instruction that adds to the exponent
(VSCALEFPS, which gives 0 far below float32's range). Blocks are (32 keys, 32 queries) in float32.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev, Polynomial

from llmc_cli.kernels.cpu.amx.intrinsics import (
    FLOATS,
    HALVES,
    INT32,
    INT64,
    TILE,
    WORDS,
    at,
    call,
    load_vector,
    round_pair,
)

LOG2_E = np.float32(np.log2(np.e))
DEGREE = 5
PAIRS = 16  # of rows in a block
ROW = 128  # bytes

# 2^f = 1 + f · p(f) for |f| ≤ 1/2, interpolated at Chebyshev points; the relative error is at most 1e-7
_SLOPE = Chebyshev.interpolate(lambda f: np.expm1(f * np.log(2)) / f, DEGREE, domain=[-0.5, 0.5])
COEFFICIENTS = [float(np.float32(c)) for c in _SLOPE.convert(kind=Polynomial).coef]


def _all(value: float) -> Any:
    return ir.Constant(FLOATS, [value] * 16)


def _spread(builder: Any, number: Any) -> Any:
    """Return a number in all 16 lanes."""
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), number, INT32(0))
    return builder.shuffle_vector(first, first, ir.Constant(WORDS, [0] * 16))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", FLOATS, a, b, c)


def _power(builder: Any, t: Any) -> Any:
    """Return 2^t."""
    whole = call(builder, "llvm.nearbyint.v16f32", FLOATS, t)
    part = builder.fsub(t, whole)
    value = _all(COEFFICIENTS[-1])
    for coefficient in [*COEFFICIENTS[-2::-1], 1.0]:
        value = _fma(builder, value, part, _all(coefficient))
    every, nearest = ir.Constant(ir.IntType(16), -1), INT32(4)  # all lanes; the current rounding mode
    return call(builder, "llvm.x86.avx512.mask.scalef.ps.512", FLOATS, value, whole, value, every, nearest)


def _interleaved(builder: Any, low: Any, high: Any) -> Any:
    """Return 16 pairs of bf16, one number from each vector."""
    pairs = ir.Constant(ir.VectorType(INT32, 32), [half for i in range(16) for half in (i, 16 + i)])
    halves = builder.bitcast(round_pair(builder, low, high), HALVES)
    return builder.bitcast(builder.shuffle_vector(halves, halves, pairs), WORDS)


def _store(builder: Any, words: Any, address: Any, offset: int) -> None:
    builder.store(words, at(builder, address, offset, WORDS)).align = 64


@intrinsic
def exponentials(typing_context: Any, to: Any, scores: Any, blocks: Any, shifts: Any, totals: Any, factor: Any) -> Any:
    """Panel of b at ``to`` (k: keys, columns: queries) = 2^(score · factor + shift) for ``blocks`` blocks of scores.

    ``shifts`` and ``totals`` are the addresses of a float32 per query; the exponentials are added to the totals.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, scores, blocks, shifts, totals, factor = args
        factors = _spread(builder, factor)
        halves = (0, 64)  # bytes to each half of the queries
        shift = [load_vector(builder, shifts, half, FLOATS) for half in halves]
        sums = [[cgutils.alloca_once_value(builder, _all(0.0)) for _ in range(2)] for _ in halves]
        with cgutils.for_range(builder, blocks) as block, cgutils.for_range(builder, INT64(PAIRS)) as pair:
            rows = builder.add(scores, builder.mul(block.index, INT64(PAIRS * 2 * ROW)))
            rows = builder.add(rows, builder.mul(pair.index, INT64(2 * ROW)))
            panel = builder.add(to, builder.mul(block.index, INT64(2 * TILE)))
            panel = builder.add(panel, builder.mul(pair.index, INT64(64)))
            for number, half in enumerate(halves):
                pair_of_rows = []
                for row in range(2):
                    score = load_vector(builder, rows, row * ROW + half, FLOATS)
                    value = _power(builder, _fma(builder, score, factors, shift[number]))
                    total = sums[number][row]
                    builder.store(builder.fadd(builder.load(total), value), total)
                    pair_of_rows.append(value)
                _store(builder, _interleaved(builder, *pair_of_rows), panel, number * TILE)
        for number, half in enumerate(halves):
            both = builder.fadd(*(builder.load(total) for total in sums[number]))
            added = builder.fadd(load_vector(builder, totals, half, FLOATS), both)
            builder.store(added, at(builder, totals, half, FLOATS)).align = 4
        return context.get_dummy_value()

    size = types.int64
    return types.void(size, size, size, size, size, types.float32), generate


@intrinsic
def score_gradients(
    typing_context: Any, probabilities: Any, gradients: Any, across: Any, scores: Any, dscores: Any,
    shifts: Any, deltas: Any, factor: Any, scale: Any,
) -> Any:  # fmt: skip
    """Compute probabilities and gradients of scores from one block of scores and one of gradients of probabilities.

    p = 2^(score · factor + shift) and its gradient p · (dscore - delta) · scale are written as panels of a (rows:
    keys), and the gradient also at ``across`` as a panel of b (k: keys, columns: queries). ``shifts`` and ``deltas``
    are the addresses of a float32 per query.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        probabilities, gradients, across, scores, dscores, shifts, deltas, factor, scale = args
        factors, scales = _spread(builder, factor), _spread(builder, scale)
        halves = (0, 64)
        shift, delta = ([load_vector(builder, each, half, FLOATS) for half in halves] for each in (shifts, deltas))
        with cgutils.for_range(builder, INT64(PAIRS)) as pair:
            offset = builder.mul(pair.index, INT64(2 * ROW))
            rows, drows = builder.add(scores, offset), builder.add(dscores, offset)
            line = builder.mul(pair.index, INT64(2 * 64))  # 16 rows per tile
            row_gradients: list[list[Any]] = [[], []]
            for row in range(2):
                values = []
                for number, half in enumerate(halves):
                    score = load_vector(builder, rows, row * ROW + half, FLOATS)
                    value = _power(builder, _fma(builder, score, factors, shift[number]))
                    dscore = load_vector(builder, drows, row * ROW + half, FLOATS)
                    difference = builder.fmul(builder.fsub(dscore, delta[number]), scales)
                    values.append(value)
                    row_gradients[row].append(builder.fmul(value, difference))
                _store(builder, round_pair(builder, *values), builder.add(probabilities, line), row * 64)
                _store(builder, round_pair(builder, *row_gradients[row]), builder.add(gradients, line), row * 64)
            place = builder.add(across, builder.mul(pair.index, INT64(64)))
            for number in range(2):
                _store(
                    builder,
                    _interleaved(builder, row_gradients[0][number], row_gradients[1][number]),
                    place,
                    number * TILE,
                )
        return context.get_dummy_value()

    size = types.int64
    return types.void(*[size] * 7, types.float32, types.float32), generate
