"""A small matrix product with its sums in registers, for attention.

The code uses LLVM's generic vectors in the width of this processor, so one source serves AVX-512, AVX2 and NEON.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from llmc_cli.kernels.cpu.compiling import CONTRACT, helper, target


def vector_shape() -> tuple[int, int]:
    """Return the lanes of a vector and the rows of a tile: rows x 2 accumulators, two vectors and a broadcast must fit
    into the registers."""
    triple, _, features = target()
    enabled = features.split(",")
    if "+avx512f" in enabled:
        return 16, 8
    if "+avx" in enabled:
        return 8, 4
    return 4, 8 if triple.startswith(("aarch64", "arm64")) else 4


LANES, ROWS = vector_shape()
COLUMNS = 2 * LANES


@intrinsic
def tile_product(
    typing_context: Any, c: Any, at_c: Any, ldc: Any, a: Any, at_a: Any, row_a: Any, step_a: Any,
    b: Any, at_b: Any, ldb: Any, depth: Any, acc: Any,
) -> Any:  # fmt: skip
    """Compute one tile (ROWS, COLUMNS) of ``multiply``. ``at_*`` are offsets of first elements, ``ld*``, ``row_a`` and
    ``step_a`` strides, all in elements."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), LANES)
        _, at_c, ldc, _, at_a, row_a, step_a, _, at_b, ldb, depth, acc = args

        def address(position: int, offset: Any) -> Any:
            data = context.make_array(signature.args[position])(context, builder, args[position]).data
            return builder.gep(data, [offset])

        def vectors(pointer: Any) -> list[Any]:
            """Return pointers to the two vectors of a row."""
            places = [pointer, builder.gep(pointer, [ir.Constant(ir.IntType(64), LANES)])]
            return [builder.bitcast(place, vector.as_pointer()) for place in places]

        def load(place: Any) -> Any:
            loaded = builder.load(place)
            loaded.align = 4
            return loaded

        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        rows = [address(0, at_c)]
        for _ in range(1, ROWS):
            rows.append(builder.gep(rows[-1], [ldc]))
        places = [place for row in rows for place in vectors(row)]
        sums = [cgutils.alloca_once(builder, vector) for _ in places]
        with builder.if_else(builder.trunc(acc, ir.IntType(1))) as (add, overwrite):
            with add:
                for place, total in zip(places, sums, strict=True):
                    builder.store(load(place), total)
            with overwrite:
                for total in sums:
                    builder.store(ir.Constant(vector, [0.0] * LANES), total)
        with cgutils.for_range(builder, depth) as loop:
            element = address(3, builder.add(at_a, builder.mul(loop.index, step_a)))
            row_b = address(7, builder.add(at_b, builder.mul(loop.index, ldb)))
            factors = [load(place) for place in vectors(row_b)]
            for i in range(ROWS):
                lane = builder.insert_element(
                    ir.Constant(vector, ir.Undefined), load(element), ir.Constant(ir.IntType(32), 0)
                )
                broadcast = builder.shuffle_vector(lane, ir.Constant(vector, ir.Undefined), zeros)
                for factor, total in zip(factors, sums[2 * i : 2 * i + 2], strict=True):
                    builder.store(builder.call(multiply_add, [broadcast, factor, builder.load(total)]), total)
                if i + 1 < ROWS:
                    element = builder.gep(element, [row_a])
        for place, total in zip(places, sums, strict=True):
            builder.store(builder.load(total), place).align = 4
        return context.get_dummy_value()

    size = types.int64
    return types.void(c, size, size, a, size, size, size, b, size, size, size, types.boolean), generate


@helper(CONTRACT, inline=False)
def multiply(c, a, b, depth, transpose_a, acc):
    """c (rows,columns) = a (rows,depth) · b (depth,columns), overwritten, or added to with ``acc``.

    With ``transpose_a`` a is (depth,rows). a may have more than depth columns, and b more rows. rows must be a multiple
    of ROWS, columns of COLUMNS.
    """
    rows, columns = c.shape
    row_a, step_a = (1, a.shape[1]) if transpose_a else (a.shape[1], 1)
    for i in range(0, rows, ROWS):
        for j in range(0, columns, COLUMNS):
            tile_product(c, i * columns + j, columns, a, i * row_a, row_a, step_a, b, j, b.shape[1], depth, acc)
