"""Products of a few rows and a matrix that is read once: the matrix products of decoding.

The matrix (O,K) is float32, bfloat16 or int8, distinguished by its element type (see quantization.py), and converted to
float32 in registers. If the processor multiplies bytes (VNNI), int8 stays bytes, and each number of x is split into two
signed bytes, so that all products and sums are exact.

Memory bandwidth limits the speed, so several rows of the matrix are streamed at once, and groups of rows of x are
multiplied with a block of it while it is in the cache. Each number of the result is summed in the same order for any
number of rows, so a row has the same bits alone and in a batch.
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
from llmc_cli.kernels.cpu.quantization import largest_magnitude
from llmc_cli.kernels.cpu.register_tiles import LANES

BLOCK = 16  # rows of the matrix per task
ZERO_POINT = 128  # as in quantization.py, as an integer
FINE_STEPS = np.float32(32512.0)  # of x, to either side of zero: 127 · 256
WIDTH = 64  # K must be a multiple of it: whole vectors in all formats
PREFETCH_BYTES = 16384  # software prefetch distance
GROUP = 4  # rows of x that share a load
I8, I32, I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(I32, LANES)


def has_byte_products() -> bool:
    """Whether the processor has VNNI for vectors of ``LANES``."""
    return {16: "+avx512vnni", 8: "+avxvnni"}.get(LANES, "none") in target()[2].split(",")


class Emitter:
    """Generates the code of a product of ``rows`` rows of the matrix, from ``first`` on, and ``group`` rows of x.

    Rows after the matrix's ``last`` are replaced by it, so its result is written more than once.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, rows: int, group: int) -> None:
        self.context, self.builder, self.signature, self.args = context, builder, signature, args
        self.rows, self.group = rows, group

    def data(self, position: int) -> Any:
        """Return a pointer to the first element of an array argument."""
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
        place = self.builder.gep(place, [I64(PREFETCH_BYTES)])
        self.builder.call(function, [place, I32(0), I32(3), I32(1)])  # a read, high locality, data cache

    def function(self, name: str, result: Any, arguments: list[Any]) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)

    def row_indices(self, first: Any, last: Any) -> list[Any]:
        indices = [self.builder.add(first, I64(row)) for row in range(self.rows)]
        return [self.builder.select(self.builder.icmp_signed("<", row, last), row, last) for row in indices]

    def sum(self, vector: Any, add: Callable[[Any, Any], Any]) -> Any:
        """Return the sum of a vector by adding halves, an order that the optimizer cannot change."""
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

    def as_floats(self, w: Any, offset: Any) -> list[Any]:
        """Load LANES elements of the matrix as vectors of float32: two vectors for bfloat16, else one."""
        b, kind = self.builder, w.type.pointee
        loaded = self.load(w, offset, FLOATS if kind == ir.FloatType() else ir.VectorType(kind, LANES))
        if kind == ir.FloatType():
            return [loaded]
        if kind == I32:
            low = b.shl(loaded, ir.Constant(INTS, [16] * LANES))
            high = b.and_(loaded, ir.Constant(INTS, [0xFFFF0000] * LANES))
            return [b.bitcast(low, FLOATS), b.bitcast(high, FLOATS)]
        return [b.sitofp(b.sub(b.zext(loaded, INTS), ir.Constant(INTS, [ZERO_POINT] * LANES)), FLOATS)]


def float_product(rows: int, group: int) -> Any:
    """Return an intrinsic: y[at_y + i·ldy + row] = x[at_x + i·depth : at_x + (i+1)·depth] · w[row], for ``group`` rows
    i of x and ``rows`` rows of w."""

    @intrinsic
    def product(
        typing_context: Any, y: Any, at_y: Any, ldy: Any, w: Any, first: Any, last: Any, x: Any, at_x: Any, depth: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit = Emitter(context, builder, signature, args, rows, group)
            _, at_y, ldy, _, first, last, _, at_x, depth = args
            indices, matrix = emit.row_indices(first, last), emit.data(3)
            per_element = 2 if matrix.type.pointee == I32 else 1  # numbers
            elements = builder.udiv(depth, I64(per_element))
            w_rows = [builder.gep(matrix, [builder.mul(index, elements)]) for index in indices]
            x_rows = [builder.gep(emit.data(6), [builder.add(at_x, builder.mul(depth, I64(i)))]) for i in range(group)]
            sums = [
                [[cgutils.alloca_once(builder, FLOATS) for _ in range(per_element)] for _ in x_rows] for _ in w_rows
            ]
            for total in (total for row in sums for parts in row for total in parts):
                builder.store(ir.Constant(FLOATS, [0.0] * LANES), total)
            multiply_add = emit.function(f"llvm.fmuladd.v{LANES}f32", FLOATS, [FLOATS] * 3)
            with cgutils.for_range(builder, builder.udiv(elements, I64(LANES))) as loop:
                offset = builder.mul(loop.index, I64(LANES))
                for row in w_rows:
                    emit.prefetch(row, offset)
                factors = [emit.as_floats(row, offset) for row in w_rows]
                for i, x_row in enumerate(x_rows):
                    for part in range(per_element):
                        place = builder.add(builder.mul(offset, I64(per_element)), I64(part * LANES))
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
    """Return an intrinsic like ``float_product``, of bytes: x is digits (S,2,K), a number being 256 · the first + the
    second; the sums start from ``starts`` (S,2), which compensates for ``ZERO_POINT``."""

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
            # newer versions of LLVM declare vectors of bytes here, but accept these, too
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


WIDE = LANES == 16  # AVX-512, with 32 vector registers; AVX2 has 16
ROWS, BYTE_ROWS = 2, 4
GROUP_ROWS, GROUP_BYTE_ROWS = (2, 2) if WIDE else (1, 1)
float_single, float_group = float_product(ROWS, 1), float_product(GROUP_ROWS, GROUP)
byte_single, byte_group = byte_product(BYTE_ROWS, 1), byte_product(GROUP_BYTE_ROWS, GROUP)


@helper(CONTRACT, inline=False)
def scale_piece(y, scales, step):
    for o in range(y.size):
        y[o] *= scales[o] * step


@helper(CONTRACT, inline=False)
def add_piece(y, b):
    for o in range(y.size):
        y[o] += b[o]


@helper(CONTRACT)
def finish(y, act, b, biased, apply_gelu, columns):
    """Apply bias and GELU to some columns of each row."""
    for i in range(y.shape[0]):
        if biased:
            add_piece(y[i, columns], b[columns])
        if apply_gelu:
            gelu_piece(act[i, columns], y[i, columns])


def float_rows(y, act, x, w, scales, b, scaled, biased, apply_gelu):
    """y (S,O) = x (S,K) · w (≥O,K)ᵀ · scales (O,) + b (O,), and act (S,O) = gelu(y). Flags enable scales, b and act."""
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
                float_single(y, i * O, O, w, o, O - 1, x, i * K, K)
        columns = slice(start, stop)
        if scaled:
            for i in range(S):
                scale_piece(y[i, columns], scales[columns], ONE)
        finish(y, act, b, biased, apply_gelu, columns)


@helper(CONTRACT, inline=False)
def split_digits(high, low, x):
    """Quantize x (K,) as step · (256 · high + low), where high and low (K,) are int8; return step.

    If x is not finite, the step is not finite either.
    """
    largest = largest_magnitude(x)
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


def byte_rows(y, act, x, w, scales, b, biased, apply_gelu, digits, starts, steps):
    """``float_rows`` for int8 w (O,K) on a processor that multiplies bytes. The last three arrays are scratch memory:
    digits (S,2,K), starts (S,2), steps (S,)."""
    S, O = y.shape  # noqa: E741
    K = w.shape[1]
    for i in range(S):
        steps[i] = split_digits(digits[i, 0], digits[i, 1], x[i])
        for digit in range(2):
            starts[i, digit] = -ZERO_POINT * sum_bytes(digits[i, digit])
    for block in prange((O + BLOCK - 1) // BLOCK):
        start, stop = block * BLOCK, min(O, (block + 1) * BLOCK)
        grouped = S - S % GROUP
        for i in range(0, grouped, GROUP):
            for o in range(start, stop, GROUP_BYTE_ROWS):
                byte_group(y, i * O, O, w, o, O - 1, digits, starts, i, K)
        for i in range(grouped, S):
            for o in range(start, stop, BYTE_ROWS):
                byte_single(y, i * O, O, w, o, O - 1, digits, starts, i, K)
        columns = slice(start, stop)
        for i in range(S):
            scale_piece(y[i, columns], scales[columns], steps[i])
        finish(y, act, b, biased, apply_gelu, columns)


BYTE_PRODUCTS = has_byte_products()
COMMON = (float1, float1, boolean, boolean, boolean)
fp32_rows = kernel(float2, float2, float2, float2, *COMMON, fastmath=CONTRACT)(float_rows)
bf16_rows = kernel(float2, float2, float2, uint2, *COMMON, fastmath=CONTRACT)(float_rows)
BYTES = (float1, float1, boolean, boolean, bytes3, int2, float1)
if BYTE_PRODUCTS:
    int8_rows = kernel(float2, float2, float2, ubytes2, *BYTES, fastmath=CONTRACT)(byte_rows)
else:
    int8_rows = kernel(float2, float2, float2, ubytes2, *COMMON, fastmath=CONTRACT)(float_rows)
