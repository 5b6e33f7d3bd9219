"""Intrinsics for Intel AMX tiles, and for the vector instructions that fill them.

A tile is 16 rows of 64 bytes. A block is 2 x 2 tiles, 32 x 32 sums in float32: the product of a panel of a (32 rows)
and a panel of b (32 columns). For each step of 32 indices k, and each of the ``parts`` of its numbers, a panel holds
two consecutive tiles: of a [16 rows][32 k] in bf16, of b [16 pairs of k][16 columns][2 k].

The number of parts is the length of a tuple, so that it is a compile-time constant. The first part is the number
rounded to bf16, which has 8 significant bits; each further part is the remainder, rounded to bf16; three parts hold all
24 bits of a float32. Addresses and strides are integers, in bytes. Instructions: Intel 64 and IA-32 Architectures
Software Developer's Manual, volume 2, TDPBF16PS and VCVTNE2PS2BF16.
"""

import ctypes
import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from llmc_cli.kernels.cpu.compiling import target

TILE = 1024  # bytes
SIDE = 32  # rows and columns of a block, and k of a step

FLAGS = {"amx_tile", "amx_bf16", "avx512f", "avx512bw", "avx512_bf16"}
FEATURES = {"+amx-tile", "+amx-bf16", "+avx512f", "+avx512bw", "+avx512bf16"}  # LLVM's names of the same
ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA = 158, 0x1023, 18  # Linux: asm/unistd_64.h, asm/prctl.h

CONFIGURATION = bytes([1] + 15 * [0] + 8 * [64, 0] + 16 * [0] + 8 * [16] + 8 * [0])
"""Tile configuration: palette 1, eight tiles of 16 rows by 64 bytes."""

PRODUCTS = {1: ((0, 0),), 2: ((1, 0), (0, 0), (0, 1)), 3: ((2, 0), (1, 1), (1, 0), (0, 0), (0, 1), (0, 2))}
"""By the number of parts: the parts of a and b whose product is not negligible, in an order that loads few tiles."""


@functools.cache
def available() -> bool:
    """Whether this processor has AMX tiles, numba compiles for them, and the system permits this process to use them.

    The first call requests the permission. NUMBA_CPU_NAME may name another processor, for which LLVM would abort the
    process on an AMX instruction.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    compiled_for = target()[2].split(",")
    if not (FLAGS <= set(flags) and FEATURES <= set(compiled_for)):
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA) == 0)


class BFloat16(ir.Type):  # type: ignore[misc]  # llvmlite has no annotations
    """LLVM's bfloat type, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat16)

    def __hash__(self) -> int:
        return hash(BFloat16)


BYTE, INT16, INT32, INT64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
POINTER = BYTE.as_pointer()
FLOATS, WORDS = ir.VectorType(ir.FloatType(), 16), ir.VectorType(INT32, 16)
HALVES, BFLOATS = ir.VectorType(INT16, 32), ir.VectorType(BFloat16(), 32)

Emitter = Callable[..., None]
"""Emits instructions, given a builder and LLVM values."""


def call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    """Call an LLVM intrinsic."""
    function = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def at(builder: Any, address: Any, offset: int, to: Any) -> Any:
    """Return a pointer to the type ``to``, at ``address`` + ``offset``."""
    return builder.inttoptr(builder.add(address, INT64(offset)), to.as_pointer())


def load_vector(builder: Any, address: Any, offset: int, to: Any) -> Any:
    loaded = builder.load(at(builder, address, offset, to))
    loaded.align = 4
    return loaded


def _load_tile(builder: Any, tile: int, address: Any, stride: Any) -> None:
    call(builder, "llvm.x86.tileloadd64", ir.VoidType(), BYTE(tile), at(builder, address, 0, BYTE), stride)


def round_pair(builder: Any, low: Any, high: Any) -> Any:
    """Return 32 numbers rounded to bf16, those of ``low`` first, as 16 words."""
    rounded = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", BFLOATS, high, low)
    return builder.bitcast(rounded, WORDS)


def _split(builder: Any, low: Any, high: Any, parts: int) -> list[Any]:
    """Return the bf16 parts of 32 numbers, each as 16 words."""
    words = []
    for part in range(parts):
        rounded = round_pair(builder, low, high)
        words.append(rounded)
        if part + 1 < parts:
            halves = builder.bitcast(rounded, HALVES)
            low = builder.fsub(low, _to_float32(builder, halves, 0))
            high = builder.fsub(high, _to_float32(builder, halves, 16))
    return words


def _to_float32(builder: Any, halves: Any, start: int) -> Any:
    """Return 16 of the bf16 numbers ``halves`` as float32."""
    chosen = builder.shuffle_vector(halves, halves, ir.Constant(WORDS, list(range(start, start + 16))))
    words = builder.shl(builder.zext(chosen, WORDS), ir.Constant(WORDS, [16] * 16))
    return builder.bitcast(words, FLOATS)


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the transpose of 16 x 16 words, in four rounds that exchange blocks between pairs of rows."""

    def exchanged(rows: list[Any], distance: int) -> list[Any]:
        """Swap the blocks of ``distance`` x ``distance`` words that lie off the diagonal of each pair of blocks."""
        out = list(rows)
        upper = [i if not i & distance else 16 + i - distance for i in range(16)]
        lower = [i + distance if not i & distance else 16 + i for i in range(16)]
        for i in range(16):
            if not i & distance:
                for to, chosen in ((i, upper), (i + distance, lower)):
                    indices = ir.Constant(WORDS, chosen)
                    out[to] = builder.shuffle_vector(rows[i], rows[i + distance], indices)
        return out

    for distance in (8, 4, 2, 1):
        rows = exchanged(rows, distance)
    return rows


def _emit_pack(builder: Any, to: Any, source: Any, stride: Any, parts: int, along: bool, transpose: bool) -> None:
    """Pack one tile of each part from floats: 16 rows of 32, with k ``along`` the rows, or 32 rows of 16, k across."""
    rows: list[list[Any]] = [[] for _ in range(parts)]
    interleaved = ir.Constant(ir.VectorType(INT32, 32), [half for i in range(16) for half in (i, 16 + i)])
    for _ in range(16):
        low = load_vector(builder, source, 0, FLOATS)
        if not along:
            source = builder.add(source, stride)
        high = load_vector(builder, source, 64 if along else 0, FLOATS)
        source = builder.add(source, stride)
        for part, words in enumerate(_split(builder, low, high, parts)):
            if not along:
                halves = builder.bitcast(words, HALVES)
                words = builder.bitcast(builder.shuffle_vector(halves, halves, interleaved), WORDS)
            rows[part].append(words)
    for part in range(parts):
        for i, words in enumerate(_transposed(builder, rows[part]) if transpose else rows[part]):
            builder.store(words, at(builder, to, part * 2 * TILE + i * 64, WORDS)).align = 64


def _packing(along: bool, transpose: bool) -> Any:
    @intrinsic
    def pack(typing_context: Any, to: Any, source: Any, stride: Any, parts: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            to, source, stride, _ = args
            _emit_pack(builder, to, source, stride, parts.count, along, transpose)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, parts), generate

    return pack


pack_a_along, pack_a_across = _packing(True, False), _packing(False, True)
pack_b_along, pack_b_across = _packing(True, True), _packing(False, False)
"""(to, source, stride, parts): pack one tile of a panel of a or b, in every part, from floats: k runs along 16 rows
of 32 floats, or across 32 rows of 16."""


@intrinsic
def configure(typing_context: Any) -> Any:
    """Configure the tiles of this thread."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        constant = cgutils.global_constant(builder, "tile_configuration", cgutils.make_bytearray(CONFIGURATION))
        call(builder, "llvm.x86.ldtilecfg", ir.VoidType(), builder.bitcast(constant, POINTER))
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def release(typing_context: Any) -> Any:
    """Release the tiles of this thread, so that the system need not save them."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        call(builder, "llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def multiply_block(
    typing_context: Any,
    to: Any,
    to_stride: Any,
    source: Any,
    source_stride: Any,
    a: Any,
    b: Any,
    steps: Any,
    parts: Any,
) -> Any:
    """Block at ``to`` = block at ``source`` (address 0: zeros) + the product of ``steps`` steps of panels a and b.

    Both blocks are float32 with rows ``stride`` apart; with a stride of 0 all 32 rows are the same.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, to_stride, source, source_stride, a, b, steps, _ = args

        def places(address: Any, stride: Any) -> list[Any]:
            below = builder.add(address, builder.shl(stride, INT64(4)))
            return [builder.add(start, INT64(column)) for start in (address, below) for column in (0, 64)]

        with builder.if_else(builder.icmp_signed("==", source, INT64(0))) as (zeros, given):
            with zeros:
                for tile in range(4):
                    call(builder, "llvm.x86.tilezero", ir.VoidType(), BYTE(tile))
            with given:
                for tile, place in enumerate(places(source, source_stride)):
                    _load_tile(builder, tile, place, source_stride)
        step_bytes = INT64(2 * TILE * parts.count)
        with cgutils.for_range(builder, steps) as loop:
            offset = builder.mul(loop.index, step_bytes)
            _emit_step(builder, builder.add(a, offset), builder.add(b, offset), parts.count)
        for tile, place in enumerate(places(to, to_stride)):
            pointer = at(builder, place, 0, BYTE)
            call(builder, "llvm.x86.tilestored64", ir.VoidType(), BYTE(tile), pointer, to_stride)
        return context.get_dummy_value()

    size = types.int64
    return types.void(*[size] * 7, parts), generate


def _emit_step(builder: Any, a: Any, b: Any, parts: int) -> None:
    """Add the products of one step to tiles 0 to 3. Tiles 4 and 5 hold a part of a, tiles 6 and 7 a part of b; they are
    loaded when the part changes, between multiplications, which take longer."""
    loaded: tuple[int | None, int | None] = None, None
    for product in PRODUCTS[parts]:
        pending = {4 + 2 * which + half: (which, product[which], half)
                   for which in range(2) if loaded[which] != product[which] for half in range(2)}  # fmt: skip
        loaded = product
        for total, left, right in ((0, 4, 6), (2, 5, 6), (1, 4, 7), (3, 5, 7)):
            for tile in (right, left):
                if tile in pending:
                    which, part, half = pending.pop(tile)
                    place = builder.add((a, b)[which], INT64((2 * part + half) * TILE))
                    _load_tile(builder, tile, place, INT64(64))
            call(builder, "llvm.x86.tdpbf16ps", ir.VoidType(), BYTE(total), BYTE(left), BYTE(right))


@intrinsic
def put_block(
    typing_context: Any,
    to: Any,
    to_stride: Any,
    source: Any,
    source_stride: Any,
    block: Any,
    block_stride: Any,
    stream: Any,
) -> Any:
    """Block at ``to`` = block at ``source`` (address 0: zeros) + ``block``, with rows ``stride`` apart.

    With ``stream`` it is written past the caches; ``to`` and its stride must be multiples of 64 then.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, to_stride, source, source_stride, block, block_stride, stream = args
        past_caches = builder.module.add_metadata([INT32(1)])

        def put(add: bool, stream: bool) -> None:
            with cgutils.for_range(builder, INT64(SIDE)) as loop:
                row, place, given = (
                    builder.add(start, builder.mul(loop.index, stride))
                    for start, stride in ((block, block_stride), (to, to_stride), (source, source_stride))
                )
                for column in (0, 64):
                    numbers = load_vector(builder, row, column, FLOATS)
                    if add:
                        numbers = builder.fadd(load_vector(builder, given, column, FLOATS), numbers)
                    stored = builder.store(numbers, at(builder, place, column, FLOATS))
                    stored.align = 64 if stream else 4
                    if stream:
                        stored.set_metadata("nontemporal", past_caches)

        with builder.if_else(builder.icmp_signed("==", source, INT64(0))) as (alone, added):
            for add, branch in ((False, alone), (True, added)):
                with branch, builder.if_else(builder.trunc(stream, ir.IntType(1))) as (past, through):
                    with past:
                        put(add, True)
                    with through:
                        put(add, False)
        return context.get_dummy_value()

    size = types.int64
    return types.void(*[size] * 6, types.boolean), generate


@intrinsic
def transpose_block(typing_context: Any, to: Any, to_stride: Any, source: Any) -> Any:
    """Block at ``to`` = the transpose of the contiguous block ``source``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, to_stride, source = args
        for across in (0, 1):
            place = builder.add(to, INT64(64 * across))
            for down in (0, 1):
                rows = [load_vector(builder, source, 64 * down + 128 * (16 * across + i), WORDS) for i in range(16)]
                for row in _transposed(builder, rows):
                    builder.store(row, at(builder, place, 0, WORDS)).align = 4
                    place = builder.add(place, to_stride)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """Return a pointer for ``numba.carray``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], POINTER)

    return types.voidptr(types.int64), generate


@intrinsic
def load_float(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load_vector(builder, args[0], 0, ir.FloatType())

    return types.float32(types.int64), generate


@intrinsic
def store_float(typing_context: Any, address: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], at(builder, args[0], 0, ir.FloatType())).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate
