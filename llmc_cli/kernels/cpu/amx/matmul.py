"""Matrix products on AMX tiles, of float32 arrays whose numbers are split into one, two or three bf16 parts.

Of a (M,K) and b (K,N) the one with more rows or columns is divided into tasks, each of which packs its block into
panels (intrinsics.py) for itself, some k at a time, small enough to stay in the second-level cache. The other one is
packed before by all threads together, once, or where it is large piece by piece along k. So with a few hundred rows of
activations the weights are read from memory once, and their packed form is never written back.

A task goes through panels of b, some steps of a panel (that stay in the first-level cache) against all panels of a.
Sums run over k in one order, whatever the blocks and threads: between two pieces of k they are kept in float32 as they
are. So the same inputs give the same bits. Bias and GELU are part of this: sums start from the one, and the other is
taken of a block before it leaves the first-level cache.

A number in one part is off by 2^-8 at most, in two by 2^-16. So the error relative to |a|·|b| is at most 2^-7 of one
part, and 3 · 2^-16 of two, whose second parts are not multiplied with each other (three products). That of three parts
(six products) is float32's own.
"""

from typing import NamedTuple

import numba
import numpy as np
from numba import prange
from numba.core import types
from numpy.typing import NDArray

from llmc_cli.errors import MissingError
from llmc_cli.kernels.cpu import blas, linear
from llmc_cli.kernels.cpu.amx import intrinsics
from llmc_cli.kernels.cpu.amx.panels import BLOCK, EDGE, ROW, SIDE, copy, copy_block, pack, vector
from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, boolean, helper, int64, register, specialized
from llmc_cli.kernels.cpu.exponential import ZERO
from llmc_cli.kernels.cpu.linear import gelu_piece, gelu_piece_backward
from llmc_cli.kernels.cpu.matmul import apply_gelu

Float32 = NDArray[np.float32]

LINE_ROWS = {1: 512, 2: 256, 3: 256}  # rows of a that are packed before, where b has more columns than that
SHARED = 32 << 20  # bytes of what is packed before; products of more go piece by piece along k
PIECE = 32  # panels times steps that are packed at a time, where all threads pack
PAGE = 4096
STREAMED = 4 << 20  # bytes of c from which on it is written past the caches: it would not stay there
NO_GELU, GELU, GELU_BACKWARD = 0, 1, 2
WIDTH = EDGE // 4  # numbers that are summed over lines side by side
PRECISE = 3  # parts: all of a float32
NAMES = {1: "bf16 on AMX tiles", 2: "three bf16 products on AMX tiles", 3: "six bf16 products on AMX tiles"}
STEPS = {1: 8, 2: 4, 3: 2}  # of a panel of b that stay in the first-level cache, by the number of parts
LINES = {1: 384, 2: 256, 3: 128}  # rows of a or columns of b in a task
DEPTH = {1: 32, 2: 24, 3: 24}  # steps that a task packs at a time: its block stays in the second-level cache


@helper(CONTRACT, inline=False)
def multiply_panels(
    c, ldc, rows, columns, start, start_stride, beside, ld_beside, gelu,
    a, panel, b, steps, at_once, sums, stream, parts,
):  # fmt: skip
    """c (rows,columns), at most 32 columns, = ``start`` + panels of a times one of b.

    ``start``: 0 for zeros, c itself, or one row with a ``start_stride`` of 0. ``gelu``: what happens to a block that is
    complete, with one ``beside`` it. ``sums`` is scratch for a block of sums of each panel of a, and two more; it also
    stands for blocks of c that are not whole. ``stream``: whole blocks go past the caches.
    """
    size = 2 * intrinsics.TILE * len(parts)
    apart = len(parts) == PRECISE  # the sums of each turn start from zeros, so that they round finely
    turn = sums + (rows + SIDE - 1) // SIDE * BLOCK
    other = turn + BLOCK
    for step in range(0, steps, at_once):
        count = min(at_once, steps - step)
        for i in range((rows + SIDE - 1) // SIDE):
            room, place = sums + i * BLOCK, c + i * SIDE * ldc
            lines = min(SIDE, rows - i * SIDE)
            whole = lines == SIDE and columns == SIDE
            if step > 0:
                source, stride = room, ROW
            elif start_stride == 0 or whole:
                source, stride = start + i * SIDE * start_stride, start_stride
            else:
                copy(room, ROW, start + i * SIDE * start_stride, start_stride, lines, columns)
                source, stride = room, ROW
            last = step + count == steps
            to, to_stride = (place, ldc) if last and whole and gelu == NO_GELU else (room, ROW)
            streamed = stream and last and whole
            left, right = a + i * panel + step * size, b + step * size
            if apart:
                intrinsics.multiply_block(turn, ROW, 0, 0, left, right, count, parts)
                intrinsics.put_block(to, to_stride, source, stride, turn, ROW, streamed and gelu == NO_GELU)
            elif streamed and gelu == NO_GELU:
                intrinsics.multiply_block(turn, ROW, source, stride, left, right, count, parts)
                intrinsics.put_block(to, to_stride, 0, 0, turn, ROW, True)
            else:
                intrinsics.multiply_block(to, to_stride, source, stride, left, right, count, parts)
            if not last:
                continue
            if gelu == GELU:
                gelu_piece(vector(other, SIDE * SIDE), vector(room, SIDE * SIDE))
                write(beside + i * SIDE * ld_beside, ld_beside, other, lines, columns, streamed)
            elif gelu == GELU_BACKWARD:
                copy_block(other, ROW, beside + i * SIDE * ld_beside, ld_beside, lines, columns)
                gelu_piece_backward(vector(room, SIDE * SIDE), vector(other, SIDE * SIDE))
            if gelu != NO_GELU or not whole:
                write(place, ldc, room, lines, columns, streamed)


@helper(CONTRACT, inline=False)
def write(to, stride, block, rows, columns, streamed):
    if streamed:
        intrinsics.put_block(to, stride, 0, 0, block, ROW, True)
    else:
        copy_block(to, stride, block, ROW, rows, columns)


@helper(REORDER, inline=False)
def add_lines(to, source, stride, count, size, acc, room):
    """``size`` numbers at ``to`` = or += the sum of ``count`` lines of them, ``stride`` bytes apart; ``room``: scratch
    for ``WIDTH`` numbers."""
    for start in range(0, size, WIDTH):
        width = min(WIDTH, size - start)
        total, place = vector(room, width), vector(to + start * 4, width)
        total[:] = ZERO
        for i in range(count):
            line = vector(source + i * stride + start * 4, width)
            for j in range(width):
                total[j] += line[j]
        for j in range(width):
            place[j] = place[j] + total[j] if acc else total[j]


@specialized
def product(
    c, ldc, M, N, K, a, lda, a_along, b, ldb, b_along, bias, acc, dbias, beside, ld_beside, gelu,
    shared, private, private_bytes, workers, block, depth, at_once, divide_a, stream, parts,
):  # fmt: skip
    """The whole product: addresses and bytes between rows of c, a, b. ``block``: rows or columns of a task; ``depth``:
    steps that a task packs at a time; ``private``: ``private_bytes`` of scratch for each of the ``workers``. 0 for
    ``bias``, ``dbias`` or ``beside``: there is none; sums are made where a is divided and given across."""
    size = 2 * intrinsics.TILE * len(parts)
    all_steps = (K + SIDE - 1) // SIDE
    panels = ((N if divide_a else M) + SIDE - 1) // SIDE
    pairs = panels * all_steps
    pieces = (pairs + PIECE - 1) // PIECE
    for worker in prange(workers):
        edge = private + worker * private_bytes
        for piece in range(worker, pieces, workers):
            first, last = piece * PIECE, min(pairs, (piece + 1) * PIECE)
            if divide_a:
                pack(shared, all_steps * size, all_steps, b, ldb, b_along, True, N, K, first, last, edge, parts)
            else:
                pack(shared, all_steps * size, all_steps, a, lda, a_along, False, M, K, first, last, edge, parts)
    tasks = ((M if divide_a else N) + block - 1) // block
    for worker in prange(workers):
        intrinsics.configure()
        edge = private + worker * private_bytes
        edge_bias = edge + EDGE
        sums = edge_bias + ROW
        own = sums + (((block if divide_a else M) + SIDE - 1) // SIDE + 2) * BLOCK
        for task in range(worker, tasks, workers):
            m, n = (task * block, 0) if divide_a else (0, task * block)
            rows, columns = (min(block, M - m), N) if divide_a else (M, min(block, N - n))
            for step in range(0, all_steps, depth):
                steps = min(depth, all_steps - step)
                k = step * SIDE
                deep = min(steps * SIDE, K - k)
                count = ((rows if divide_a else columns) + SIDE - 1) // SIDE * steps
                if divide_a:
                    at = a + (m * lda + k * 4 if a_along else k * lda + m * 4)
                    pack(own, steps * size, steps, at, lda, a_along, False, rows, deep, 0, count, edge, parts)
                    if dbias != 0:  # of what the caches hold now
                        add_lines(dbias + m * 4, at, lda, deep, rows, acc or step > 0, edge)
                else:
                    at = b + (n * ldb + k * 4 if b_along else k * ldb + n * 4)
                    pack(own, steps * size, steps, at, ldb, b_along, True, columns, deep, 0, count, edge, parts)
                part = shared + step * size
                for j in range(0, columns, SIDE):
                    width = min(SIDE, columns - j)
                    place = c + m * ldc + (n + j) * 4
                    start, start_stride = 0, 0
                    if acc or step > 0:
                        start, start_stride = place, ldc
                    elif bias != 0:
                        start = bias + (n + j) * 4
                        if width < SIDE:
                            copy(edge_bias, ROW, start, ROW, 1, width)
                            start = edge_bias
                    strip, panel = (part, all_steps * size) if divide_a else (own, steps * size)
                    strip += j // SIDE * panel
                    left, left_panel = (own, steps * size) if divide_a else (part, all_steps * size)
                    multiply_panels(
                        place, ldc, rows, width, start, start_stride,
                        beside + m * ld_beside + (n + j) * 4, ld_beside, gelu if step + steps == all_steps else NO_GELU,
                        left, left_panel, strip, steps, at_once, sums, stream, parts,
                    )  # fmt: skip
        intrinsics.release()


def register_product(parts: int) -> None:
    """Register ``product`` for numbers in this many parts."""
    numbers = [int64] * 7 + [boolean] + [int64] * 2 + [boolean, int64, boolean] + [int64] * 11 + [boolean] * 2
    register(product, *numbers, types.UniTuple(int64, parts))


class TileMatmul:
    """``matmul.Matmul`` on tiles, of numbers in ``parts`` parts. Scratch memory grows to the largest call."""

    head_rows = 512

    def __init__(self, parts: int) -> None:
        if not intrinsics.available():  # asks for permission, too
            raise MissingError("no AMX tiles on this processor, or the system does not allow them")
        self.name = NAMES[parts]
        self.parts = tuple(range(parts))
        self._shared = self._private = np.empty(0, np.uint8)

    def __call__(
        self, c: Float32, a: Float32, b: Float32, *, transpose_a: bool = False, transpose_b: bool = False,
        acc: bool = False, bias: Float32 | None = None,
        act: Float32 | None = None, pre: Float32 | None = None, dbias: Float32 | None = None,
    ) -> None:  # fmt: skip
        M, N = c.shape
        K = a.shape[0] if transpose_a else a.shape[1]
        workers = numba.get_num_threads()
        blocking = self.blocking(M, N, K, workers)
        if dbias is not None and not blocking.divide_a:
            linear.sum_rows(dbias, a, acc)
            dbias = None
        if M == 1 and transpose_b and not transpose_a:  # a token at a time: b is read as it is
            blas.matmul(c, a, b, transpose_a, transpose_b, acc, bias)
            apply_gelu(c, act, pre)
            return
        if blocking.k < K:
            for start in range(0, K, blocking.k):
                piece = slice(start, min(K, start + blocking.k))
                left, right = a[piece] if transpose_a else a[:, piece], b[:, piece] if transpose_b else b[piece]
                last = piece.stop == K
                self(
                    c, left, right, transpose_a=transpose_a, transpose_b=transpose_b, acc=acc or start > 0,
                    bias=None if start else bias, act=act if last else None, pre=pre if last else None, dbias=dbias,
                )  # fmt: skip
            return
        beside, gelu = (act, GELU) if act is not None else (pre, GELU_BACKWARD) if pre is not None else (None, NO_GELU)
        written = [c] if act is None else [c, act]
        whole_lines = all(array.ctypes.data % 64 == 0 and array.strides[0] % 64 == 0 for array in written)
        stream = whole_lines and not acc and blocking.depth * SIDE >= K and 4 * M * N >= STREAMED
        self._shared = _grown(self._shared, blocking.shared)
        self._private = _grown(self._private, workers * blocking.private)
        product(
            c.ctypes.data, c.strides[0], M, N, K,
            a.ctypes.data, a.strides[0], not transpose_a, b.ctypes.data, b.strides[0], transpose_b,
            0 if bias is None else bias.ctypes.data, acc, 0 if dbias is None else dbias.ctypes.data,
            0 if beside is None else beside.ctypes.data, 0 if beside is None else beside.strides[0], gelu,
            _aligned(self._shared), _aligned(self._private), blocking.private, workers,
            blocking.lines, blocking.depth, STEPS[len(self.parts)], blocking.divide_a, stream,
            self.parts,
        )  # fmt: skip

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        blockings = [self.blocking(*size, threads) for size in sizes]
        shared, private = (max(each) for each in zip(*((b.shared, b.private) for b in blockings), strict=True))
        return int(shared + threads * private + 2 * PAGE)

    def blocking(self, M: int, N: int, K: int, workers: int) -> "Blocking":
        """How a product of this size is divided."""
        parts = len(self.parts)
        size = 2 * intrinsics.TILE * parts
        divide_a = M > LINE_ROWS[parts] or M >= N
        divided, other = (M, N) if divide_a else (N, M)
        k = min(K, max(1, SHARED // (-(-other // SIDE) * size * DEPTH[parts])) * DEPTH[parts] * SIDE)
        all_steps = -(-k // SIDE)
        even = -(-divided // (workers * 2 * SIDE)) * SIDE
        lines, depth = min(LINES[parts], even), min(DEPTH[parts], all_steps)
        shared = -(-other // SIDE) * all_steps * size
        panels_a = -(-(lines if divide_a else M) // SIDE)
        private = EDGE + ROW + (panels_a + 2) * BLOCK + lines // SIDE * depth * size
        return Blocking(divide_a, k, lines, depth, shared, -(-private // 4096) * 4096)


class Blocking(NamedTuple):
    """How a product is divided, and the scratch memory it takes in bytes, shared and per thread."""

    divide_a: bool
    k: int  # of one piece
    lines: int  # rows of a or columns of b in a task
    depth: int  # steps that are packed at a time
    shared: int
    private: int


def _grown(scratch: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return scratch if scratch.size >= size + PAGE else np.empty(size + PAGE, np.uint8)


def _aligned(scratch: NDArray[np.uint8]) -> int:
    """The first address of a page in it."""
    return int(-(-scratch.ctypes.data // PAGE) * PAGE)
