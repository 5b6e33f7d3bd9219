"""A few rows times a matrix that is read once: what decoding a token is made of.

The matrix (O,K) is in one of three forms, told apart by its type: float32 as it is; bfloat16, two to a word (see
narrow.py); or steps of a row's scale, uint8 around ``MIDDLE``. It is widened to float32 in registers. Where the
processor multiplies bytes (VNNI) the steps stay bytes and x becomes two signed bytes a number, so that every product
and sum is exact.

Memory is what bounds all this, so several rows of the matrix stream at once, and the rows of x go through a block of it
in groups, while it is in the cache. Each number of the result is summed up in the same order whatever stands beside
it: a row has the same bits alone and among others.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import prange
from numba.core import cgutils, types
from numba.extending import intrinsic

from llmc_cli.kernels.cpu.compiling import (
    CONTRACT,
    boolean,
    bytes3,
    float1,
    float2,
    helper,
    int2,
    kernel,
    target,
    ubytes2,
    uint2,
)
from llmc_cli.kernels.cpu.exponential import ONE, ROUNDER, ZERO
from llmc_cli.kernels.cpu.linear import gelu_piece
from llmc_cli.kernels.cpu.quantization import largest_of
from llmc_cli.kernels.cpu.register_tiles import LANES

BLOCK = 16  # rows of the matrix a task
MIDDLE = 128  # the step that stands for 0, as narrow.py has it
FINE_STEPS = np.float32(32512.0)  # of x: 127 · 256
WIDTH = 64  # K is a multiple of it: whole vectors of every form
AHEAD = 16384  # bytes that are asked for before their turn
GROUP = 4  # rows of x that share a load
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)


def multiplies_bytes() -> bool:
    """Whether the processor has VNNI for vectors of ``LANES``."""
    return {16: "+avx512vnni", 8: "+avxvnni"}.get(LANES, "none") in target()[2].split(",")


class Emitter:
    """Writes the code of one product: ``rows`` rows of the matrix with ``group`` rows of x.

    ``first`` and ``last`` are rows of the matrix: the first of these, and the last there is, which stands in for rows
    beyond it (the same number is then written to the same place again).
    """

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, rows: int, group: int) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args
        self.rows, self.group = rows, group

    def data(self, position: int) -> Any:
        """A pointer to the first element of an array argument."""
        make = self.context.make_array(self.signature.args[position])
        return make(self.context, self.builder, self.args[position]).data

    def load(self, pointer: Any, offset: Any, vector: Any) -> Any:
        place = self.builder.bitcast(self.builder.gep(pointer, [offset]), vector.as_pointer())
        loaded = self.builder.load(place)
        loaded.align = 1
        return loaded

    def prefetch(self, pointer: Any, offset: Any) -> None:
        place = self.builder.bitcast(self.builder.gep(pointer, [offset]), I8.as_pointer())
        function = self.function("llvm.prefetch.p0", ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
        ahead = self.builder.gep(place, [I64(AHEAD)])
        self.builder.call(function, [ahead, I32(0), I32(3), I32(1)])  # to read, to keep in all caches, data

    def function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)

    def row_indices(self, first: Any, last: Any) -> list[Any]:
        indices = [self.builder.add(first, I64(row)) for row in range(self.rows)]
        return [self.builder.select(self.builder.icmp_signed("<", row, last), row, last) for row in indices]

    def sum(self, vector: Any, add: Callable[[Any, Any], Any]) -> Any:
        """The sum over a vector, halves first: the order is given, not left to the optimizer."""
        lanes = vector.type.count
        while lanes > 1:
            lanes //= 2
            low, high = (
                ir.Constant(ir.VectorType(I32, lanes), list(range(start, start + lanes))) for start in (0, lanes)
            )
            vector = add(
                self.builder.shuffle_vector(vector, vector, low), self.builder.shuffle_vector(vector, vector, high)
            )
        return self.builder.extract_element(vector, I32(0))

    def widened(self, w: Any, offset: Any) -> list[Any]:
        """LANES numbers of the matrix as float32, of words twice as many, one vector behind the other."""
        b, kind = self.builder, w.type.pointee
        loaded = self.load(w, offset, FLOATS if kind == ir.FloatType() else ir.VectorType(kind, LANES))
        if kind == ir.FloatType():
            return [loaded]
        if kind == I32:
            low = b.shl(loaded, ir.Constant(INTS, [16] * LANES))
            high = b.and_(loaded, ir.Constant(INTS, [0xFFFF0000] * LANES))
            return [b.bitcast(low, FLOATS), b.bitcast(high, FLOATS)]
        return [b.sitofp(b.sub(b.zext(loaded, INTS), ir.Constant(INTS, [MIDDLE] * LANES)), FLOATS)]


def float_product(rows: int, group: int) -> Any:
    """An intrinsic: y[at_y + i·ldy + row] = x[at_x + i·depth …] · the row of w, for a group of i and some rows."""

    @intrinsic
    def product(
        typing_context: Any, y: Any, at_y: Any, ldy: Any, w: Any, first: Any, last: Any, x: Any, at_x: Any, depth: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emitter(context, builder, signature, args, rows, group)
            _, at_y, ldy, _, first, last, _, at_x, depth = args
            indices, matrix = emit.row_indices(first, last), emit.data(3)
            together = 2 if matrix.type.pointee == I32 else 1  # numbers in an element
            elements = builder.udiv(depth, I64(together))
            w_rows = [builder.gep(matrix, [builder.mul(index, elements)]) for index in indices]
            x_rows = [builder.gep(emit.data(6), [builder.add(at_x, builder.mul(depth, I64(i)))]) for i in range(group)]
            sums = [[[cgutils.alloca_once(builder, FLOATS) for _ in range(together)] for _ in x_rows] for _ in w_rows]
            for total in (total for row in sums for parts in row for total in parts):
                builder.store(ir.Constant(FLOATS, [0.0] * LANES), total)
            multiply_add = emit.function(f"llvm.fmuladd.v{LANES}f32", FLOATS, [FLOATS] * 3)
            with cgutils.for_range(builder, builder.udiv(elements, I64(LANES))) as loop:
                offset = builder.mul(loop.index, I64(LANES))
                for row in w_rows:
                    emit.prefetch(row, offset)
                factors = [emit.widened(row, offset) for row in w_rows]
                for i, x_row in enumerate(x_rows):
                    for part in range(together):
                        place = builder.add(builder.mul(offset, I64(together)), I64(part * LANES))
                        numbers = emit.load(x_row, place, FLOATS)
                        for factor, row in zip(factors, sums, strict=True):
                            total = row[i][part]
                            builder.store(
                                builder.call(multiply_add, [factor[part], numbers, builder.load(total)]), total
                            )
            for index, row in zip(indices, sums, strict=True):
                for i, parts in enumerate(row):
                    total = functools.reduce(builder.fadd, [builder.load(part) for part in parts])
                    place = builder.add(builder.add(at_y, index), builder.mul(ldy, I64(i)))
                    builder.store(emit.sum(total, builder.fadd), builder.gep(emit.data(0), [place]))
            return context.get_dummy_value()

        size = types.int64
        return types.void(y, size, size, w, size, size, x, size, size), generate

    return product


def byte_product(rows: int, group: int) -> Any:
    """An intrinsic like ``float_product``, of bytes: x is digits (S,2,K), a number being 256 · the first + the second;
    ``starts`` (S,2) is what makes up for ``MIDDLE`` in the sum of each digit."""

    @intrinsic
    def product(
        typing_context: Any, y: Any, at_y: Any, ldy: Any, w: Any, first: Any, last: Any, x: Any, starts: Any, at: Any,
        depth: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emitter(context, builder, signature, args, rows, group)
            _, at_y, ldy, _, first, last, _, _, at, depth = args
            indices, matrix, digits = emit.row_indices(first, last), emit.data(3), emit.data(6)
            w_rows = [builder.gep(matrix, [builder.mul(index, depth)]) for index in indices]
            lines = [builder.add(builder.mul(at, I64(2)), I64(line)) for line in range(2 * group)]
            x_rows = [builder.gep(digits, [builder.mul(line, depth)]) for line in lines]
            sums = [[cgutils.alloca_once(builder, INTS) for _ in x_rows] for _ in w_rows]
            for column, line in enumerate(lines):
                start = builder.load(builder.gep(emit.data(7), [line]))
                vector = builder.insert_element(ir.Constant(INTS, [0] * LANES), start, I32(0))
                for row in sums:
                    builder.store(vector, row[column])
            # newer versions of LLVM have vectors of bytes here, and take these as well
            dot = emit.function(f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", INTS, [INTS] * 3)
            with cgutils.for_range(builder, builder.udiv(depth, I64(4 * LANES))) as loop:
                offset = builder.mul(loop.index, I64(4 * LANES))
                for row in w_rows:
                    emit.prefetch(row, offset)
                factors = [emit.load(row, offset, INTS) for row in w_rows]
                for column, x_row in enumerate(x_rows):
                    numbers = emit.load(x_row, offset, INTS)
                    for factor, row in zip(factors, sums, strict=True):
                        total = builder.call(dot, [builder.load(row[column]), factor, numbers])
                        builder.store(total, row[column])
            for index, row in zip(indices, sums, strict=True):
                for i in range(group):
                    high, low = (
                        builder.sext(emit.sum(builder.load(total), builder.add), I64)
                        for total in row[2 * i : 2 * i + 2]
                    )
                    exact = builder.add(builder.mul(high, I64(256)), low)
                    place = builder.add(builder.add(at_y, index), builder.mul(ldy, I64(i)))
                    builder.store(builder.sitofp(exact, ir.FloatType()), builder.gep(emit.data(0), [place]))
            return context.get_dummy_value()

        size = types.int64
        return types.void(y, size, size, w, size, size, x, starts, size, size), generate

    return product


WIDE = LANES == 16  # 32 registers of it instead of 16
ROWS, BYTE_ROWS = 2, 4
GROUP_ROWS, GROUP_BYTE_ROWS = (2, 2) if WIDE else (1, 1)
float_alone, float_group = float_product(ROWS, 1), float_product(GROUP_ROWS, GROUP)
byte_alone, byte_group = byte_product(BYTE_ROWS, 1), byte_product(GROUP_BYTE_ROWS, GROUP)


@helper(CONTRACT, inline=False)
def scale_piece(y, scales, step):
    for o in range(y.size):
        y[o] *= scales[o] * step


@helper(CONTRACT, inline=False)
def add_piece(y, b):
    for o in range(y.size):
        y[o] += b[o]


@helper(CONTRACT)
def finish(y, act, b, biased, activated, here):
    """Bias and activation for the columns ``here`` of each row."""
    for i in range(y.shape[0]):
        if biased:
            add_piece(y[i, here], b[here])
        if activated:
            gelu_piece(act[i, here], y[i, here])


def float_rows(y, act, x, w, scales, b, scaled, biased, activated):
    """y (S,O) = x (S,K) · w (≥O,K)ᵀ · scales (O,) + b (O,), act (S,O) = gelu(y); the last three where asked for."""
    S, O = y.shape  # noqa: E741
    K = x.shape[1]
    for block in prange((O + BLOCK - 1) // BLOCK):
        start, stop = block * BLOCK, min(O, (block + 1) * BLOCK)
        grouped = S - S % GROUP
        for i in range(0, grouped, GROUP):
            for o in range(start, stop, GROUP_ROWS):
                float_group(y, i * O, O, w, o, O - 1, x, i * K, K)
        for i in range(grouped, S):
            for o in range(start, stop, ROWS):
                float_alone(y, i * O, O, w, o, O - 1, x, i * K, K)
        here = slice(start, stop)
        if scaled:
            for i in range(S):
                scale_piece(y[i, here], scales[here], ONE)
        finish(y, act, b, biased, activated, here)


@helper(CONTRACT, inline=False)
def split_digits(high, low, x):
    """x (K,) as multiples of the returned step, in two digits (K,) of signed bytes; a step that is not finite where x
    is not."""
    largest = largest_of(x)
    inverse = FINE_STEPS / largest if largest > ZERO else ZERO
    for j in range(x.size):
        steps = np.int32((x[j] * inverse + ROUNDER) - ROUNDER)
        digit = ((steps + np.int32(128)) & np.int32(255)) - np.int32(128)
        low[j] = digit
        high[j] = (steps - digit) >> np.int32(8)
    return largest / FINE_STEPS


@helper(CONTRACT, inline=False)
def sum_bytes(x):
    total = np.int32(0)
    for j in range(x.size):
        total += np.int32(x[j])
    return total


def byte_rows(y, act, x, w, scales, b, biased, activated, digits, starts, steps):
    """``float_rows`` for steps (O,K) on a processor that multiplies bytes; the last three arrays are scratch: digits
    (S,2,K), starts (S,2), steps (S,)."""
    S, O = y.shape  # noqa: E741
    K = w.shape[1]
    for i in range(S):
        steps[i] = split_digits(digits[i, 0], digits[i, 1], x[i])
        for digit in range(2):
            starts[i, digit] = -MIDDLE * sum_bytes(digits[i, digit])
    for block in prange((O + BLOCK - 1) // BLOCK):
        start, stop = block * BLOCK, min(O, (block + 1) * BLOCK)
        grouped = S - S % GROUP
        for i in range(0, grouped, GROUP):
            for o in range(start, stop, GROUP_BYTE_ROWS):
                byte_group(y, i * O, O, w, o, O - 1, digits, starts, i, K)
        for i in range(grouped, S):
            for o in range(start, stop, BYTE_ROWS):
                byte_alone(y, i * O, O, w, o, O - 1, digits, starts, i, K)
        here = slice(start, stop)
        for i in range(S):
            scale_piece(y[i, here], scales[here], steps[i])
        finish(y, act, b, biased, activated, here)


BYTE_PRODUCTS = multiplies_bytes()
COMMON = (float1, float1, boolean, boolean, boolean)
fp32_rows = kernel(float2, float2, float2, float2, *COMMON, fastmath=CONTRACT)(float_rows)
bf16_rows = kernel(float2, float2, float2, uint2, *COMMON, fastmath=CONTRACT)(float_rows)
BYTES = (float1, float1, boolean, boolean, bytes3, int2, float1)
if BYTE_PRODUCTS:
    int8_rows = kernel(float2, float2, float2, ubytes2, *BYTES, fastmath=CONTRACT)(byte_rows)
else:
    int8_rows = kernel(float2, float2, float2, ubytes2, *COMMON, fastmath=CONTRACT)(float_rows)
