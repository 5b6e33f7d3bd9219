"""Matrix products on AMX tiles, of float32 arrays whose numbers are split into one, two or three bf16 parts.

The larger of M and N is divided into tasks. A task packs its block of that operand into panels (see intrinsics.py),
some k at a time, so few that the packed block stays in the second-level cache. The other operand is packed before the
tasks by all threads together, or, if it is large, piece by piece along k. So with a few hundred rows of activations the
weights are read from memory once, and their packed form is never written to memory.

A task multiplies a few steps of a panel of b, which stay in the first-level cache, with all its panels of a. Sums run
over k in one order that does not depend on blocks and threads, and are float32 between two pieces of k, so the same
inputs give the same bits. Bias and GELU are fused: sums start from the bias, and GELU is applied to a block before it
leaves the first-level cache.

The rounding error of one part is at most 2^-8, of two parts 2^-16. So the error relative to |a|·|b| is at most 2^-7
with one part (one bf16 product), and 3 · 2^-16 with two parts (three products: those of the second parts are left
out). With three parts (six products) it is that of float32.
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
from llmc_cli.kernels.cpu.amx.panels import BLOCK, EDGE, ROW, SIDE, Operand, copy, copy_block, pack, vector
from llmc_cli.kernels.cpu.compiling import CONTRACT, REORDER, boolean, helper, int64, register, specialized
from llmc_cli.kernels.cpu.exponential import ZERO
from llmc_cli.kernels.cpu.linear import gelu_piece, gelu_piece_backward
from llmc_cli.kernels.cpu.matmul import apply_gelu

Float32 = NDArray[np.float32]

MAX_SHARED = 32 << 20  # bytes of the operand that all threads pack; larger products are divided along k
PIECE = 32  # pairs of a panel and a step that a thread packs at a time
PAGE = 4096
STREAMED = 4 << 20  # bytes of c: larger results would not stay in the caches, so they are written past them
NO_GELU, GELU, GELU_BACKWARD = 0, 1, 2
WIDTH = EDGE // 4  # numbers that ``add_lines`` sums at a time
FLOAT32_PARTS = 3  # these hold a whole float32


class Tuning(NamedTuple):
    """Block sizes for one number of parts, found by experiment."""

    name: str
    shared_rows: int  # a is the shared operand if it has at most this many rows and b has more columns
    lines: int  # rows of a or columns of b per task
    depth: int  # steps of 32 k that a task packs at a time: the packed block stays in the second-level cache
    cached_steps: int  # steps of a panel of b that stay in the first-level cache


TUNING = {
    1: Tuning("bf16 on AMX tiles", 512, 384, 32, 8),
    2: Tuning("three bf16 products on AMX tiles", 256, 256, 24, 4),
    3: Tuning("six bf16 products on AMX tiles", 256, 128, 24, 2),
}


class Matrix(NamedTuple):
    """A float32 matrix in memory; address 0 means that there is none."""

    address: int
    stride: int  # bytes from row to row


class Fused(NamedTuple):
    """Options of a product; address 0 means that an option is not used."""

    acc: bool
    bias: int  # address
    dbias: int  # address
    gelu: int  # NO_GELU, GELU: write act, or GELU_BACKWARD: read pre
    stream: bool  # write whole blocks past the caches


class Scratch(NamedTuple):
    """Addresses of the scratch memory, and the number of workers that it is for."""

    shared: int
    private: int  # one after the other for each worker
    workers: int


class Blocking(NamedTuple):
    """How a product is divided, and the scratch memory that it takes."""

    divide_a: bool  # into tasks, else b
    k: int  # of one piece
    lines: int  # rows of a or columns of b per task
    depth: int  # steps that a task packs at a time
    cached_steps: int
    shared: int  # bytes
    private: int  # bytes per worker


@helper(CONTRACT, inline=False)
def multiply_panels(c, rows, columns, start, activation, gelu, a, a_panel, b, steps, cached_steps, sums, stream, parts):
    """c (rows,columns), with at most 32 columns, = the matrix ``start`` + panels of a, ``a_panel`` bytes apart, times
    one panel of b.

    ``start`` has address 0 for zeros, is c itself, or a single row, with stride 0. ``gelu`` is applied to a block when
    it is complete, with a block of ``activation``. ``sums`` is scratch memory for a block per panel of a, which also
    replaces incomplete blocks of c, and for two more blocks. ``stream``: write whole blocks past the caches.
    """
    size = 2 * intrinsics.TILE * len(parts)
    separate = (
        len(parts) == FLOAT32_PARTS
    )  # for full float32 precision, each group of ``cached_steps`` steps is summed from zero and then added
    partial = sums + (rows + SIDE - 1) // SIDE * BLOCK
    other = partial + BLOCK
    for step in range(0, steps, cached_steps):
        count = min(cached_steps, steps - step)
        for i in range((rows + SIDE - 1) // SIDE):
            block, place = sums + i * BLOCK, c.address + i * SIDE * c.stride
            lines = min(SIDE, rows - i * SIDE)
            whole = lines == SIDE and columns == SIDE
            if step > 0:
                source, stride = block, ROW
            elif start.stride == 0 or whole:
                source, stride = start.address + i * SIDE * start.stride, start.stride
            else:
                copy(block, ROW, start.address + i * SIDE * start.stride, start.stride, lines, columns)
                source, stride = block, ROW
            last = step + count == steps
            to, to_stride = (place, c.stride) if last and whole and gelu == NO_GELU else (block, ROW)
            streamed = stream and last and whole
            left, right = a + i * a_panel + step * size, b + step * size
            if separate:
                intrinsics.multiply_block(partial, ROW, 0, 0, left, right, count, parts)
                intrinsics.put_block(to, to_stride, source, stride, partial, ROW, streamed and gelu == NO_GELU)
            elif streamed and gelu == NO_GELU:
                intrinsics.multiply_block(partial, ROW, source, stride, left, right, count, parts)
                intrinsics.put_block(to, to_stride, 0, 0, partial, ROW, True)
            else:
                intrinsics.multiply_block(to, to_stride, source, stride, left, right, count, parts)
            if not last:
                continue
            activation_place = activation.address + i * SIDE * activation.stride
            if gelu == GELU:
                gelu_piece(vector(other, SIDE * SIDE), vector(block, SIDE * SIDE))
                write(activation_place, activation.stride, other, lines, columns, streamed)
            elif gelu == GELU_BACKWARD:
                copy_block(other, ROW, activation_place, activation.stride, lines, columns)
                gelu_piece_backward(vector(block, SIDE * SIDE), vector(other, SIDE * SIDE))
            if gelu != NO_GELU or not whole:
                write(place, c.stride, block, lines, columns, streamed)


@helper(CONTRACT, inline=False)
def write(to, stride, block, rows, columns, streamed):
    if streamed:
        intrinsics.put_block(to, stride, 0, 0, block, ROW, True)
    else:
        copy_block(to, stride, block, ROW, rows, columns)


@helper(REORDER, inline=False)
def add_lines(to, source, stride, count, size, acc, scratch):
    """Overwrite ``size`` numbers at ``to`` with the sum of ``count`` rows, ``stride`` bytes apart, or with ``acc`` add
    the sum to them. ``scratch``: memory for ``WIDTH`` numbers."""
    for start in range(0, size, WIDTH):
        width = min(WIDTH, size - start)
        total, place = vector(scratch, width), vector(to + start * 4, width)
        total[:] = ZERO
        for i in range(count):
            line = vector(source + i * stride + start * 4, width)
            for j in range(width):
                total[j] += line[j]
        for j in range(width):
            place[j] = place[j] + total[j] if acc else total[j]


@specialized
def product(c, a, b, activation, size, fused, scratch, blocking, parts):
    """c (M,N) = a (M,K) · b (K,N), with the options ``fused``.

    c and ``activation`` (act or pre) are ``Matrix``, a and b ``Operand``, ``size`` is (M, N, K), and ``parts`` a tuple
    as long as the number of parts. dbias is computed only if a is divided and k runs across its rows.
    """
    M, N, K = size
    divide_a, depth, workers = blocking.divide_a, blocking.depth, scratch.workers
    step_bytes = 2 * intrinsics.TILE * len(parts)
    all_steps = (K + SIDE - 1) // SIDE
    pairs = ((N if divide_a else M) + SIDE - 1) // SIDE * all_steps
    pieces = (pairs + PIECE - 1) // PIECE
    for worker in prange(workers):
        edge = scratch.private + worker * blocking.private
        for piece in range(worker, pieces, workers):
            first, last = piece * PIECE, min(pairs, (piece + 1) * PIECE)
            if divide_a:
                pack(scratch.shared, all_steps * step_bytes, b, True, N, K, first, last, edge, parts)
            else:
                pack(scratch.shared, all_steps * step_bytes, a, False, M, K, first, last, edge, parts)
    tasks = ((M if divide_a else N) + blocking.lines - 1) // blocking.lines
    for worker in prange(workers):
        intrinsics.configure()
        edge = scratch.private + worker * blocking.private
        edge_bias = edge + EDGE
        sums = edge_bias + ROW
        own = sums + (((blocking.lines if divide_a else M) + SIDE - 1) // SIDE + 2) * BLOCK  # packed panels
        for task in range(worker, tasks, workers):
            m, n = (task * blocking.lines, 0) if divide_a else (0, task * blocking.lines)
            rows, columns = (min(blocking.lines, M - m), N) if divide_a else (M, min(blocking.lines, N - n))
            for step in range(0, all_steps, depth):
                steps = min(depth, all_steps - step)
                k = step * SIDE
                deep = min(steps * SIDE, K - k)
                count = ((rows if divide_a else columns) + SIDE - 1) // SIDE * steps
                if divide_a:
                    at = a.address + (m * a.stride + k * 4 if a.k_contiguous else k * a.stride + m * 4)
                    left = Operand(at, a.stride, a.k_contiguous)
                    pack(own, steps * step_bytes, left, False, rows, deep, 0, count, edge, parts)
                    if fused.dbias != 0:  # while a is in the caches
                        add_lines(fused.dbias + m * 4, at, a.stride, deep, rows, fused.acc or step > 0, edge)
                else:
                    at = b.address + (n * b.stride + k * 4 if b.k_contiguous else k * b.stride + n * 4)
                    right = Operand(at, b.stride, b.k_contiguous)
                    pack(own, steps * step_bytes, right, True, columns, deep, 0, count, edge, parts)
                part = scratch.shared + step * step_bytes
                for j in range(0, columns, SIDE):
                    width = min(SIDE, columns - j)
                    place = c.address + m * c.stride + (n + j) * 4
                    start, start_stride = 0, 0
                    if fused.acc or step > 0:
                        start, start_stride = place, c.stride
                    elif fused.bias != 0:
                        start = fused.bias + (n + j) * 4
                        if width < SIDE:
                            copy(edge_bias, ROW, start, ROW, 1, width)
                            start = edge_bias
                    b_panels, b_panel = (part, all_steps * step_bytes) if divide_a else (own, steps * step_bytes)
                    a_panels, a_panel = (own, steps * step_bytes) if divide_a else (part, all_steps * step_bytes)
                    activation_place = activation.address + m * activation.stride + (n + j) * 4
                    multiply_panels(
                        Matrix(place, c.stride), rows, width, Matrix(start, start_stride),
                        Matrix(activation_place, activation.stride),
                        fused.gelu if step + steps == all_steps else NO_GELU,
                        a_panels, a_panel, b_panels + j // SIDE * b_panel,
                        steps, blocking.cached_steps, sums, fused.stream, parts,
                    )  # fmt: skip
        intrinsics.release()


def register_product(parts: int) -> None:
    """Register ``product`` for numbers in this many parts."""
    matrix = types.NamedUniTuple(int64, 2, Matrix)
    operand = types.NamedTuple((int64, int64, boolean), Operand)
    fused = types.NamedTuple((boolean, int64, int64, int64, boolean), Fused)
    scratch = types.NamedUniTuple(int64, 3, Scratch)
    blocking = types.NamedTuple((boolean, *[int64] * 6), Blocking)
    size, parts_type = types.UniTuple(int64, 3), types.UniTuple(int64, parts)
    register(product, matrix, operand, operand, matrix, size, fused, scratch, blocking, parts_type)


class TileMatmul:
    """``matmul.Matmul`` on AMX tiles, with numbers in ``parts`` parts. Scratch memory grows to the largest call."""

    head_rows = 512

    def __init__(self, parts: int) -> None:
        if not intrinsics.available():  # also requests permission
            raise MissingError("no AMX tiles on this processor, or the system does not allow them")
        self.name = TUNING[parts].name
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
        if M == 1 and transpose_b and not transpose_a:  # a single token: packing b would take longer
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
        other, gelu = (act, GELU) if act is not None else (pre, GELU_BACKWARD) if pre is not None else (None, NO_GELU)
        activation = Matrix(0, 0) if other is None else Matrix(other.ctypes.data, other.strides[0])
        written = [c] if act is None else [c, act]
        aligned = all(array.ctypes.data % 64 == 0 and array.strides[0] % 64 == 0 for array in written)
        stream = aligned and not acc and blocking.depth * SIDE >= K and 4 * M * N >= STREAMED
        self._shared = _grown(self._shared, blocking.shared)
        self._private = _grown(self._private, workers * blocking.private)
        product(
            Matrix(c.ctypes.data, c.strides[0]),
            Operand(a.ctypes.data, a.strides[0], not transpose_a),
            Operand(b.ctypes.data, b.strides[0], transpose_b),
            activation,
            (M, N, K),
            Fused(acc, _address(bias), _address(dbias), gelu, stream),
            Scratch(_aligned(self._shared), _aligned(self._private), workers),
            blocking,
            self.parts,
        )

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        blockings = [self.blocking(*size, threads) for size in sizes]
        shared, private = max(each.shared for each in blockings), max(each.private for each in blockings)
        return shared + threads * private + 2 * PAGE

    def blocking(self, M: int, N: int, K: int, workers: int) -> Blocking:
        """Return how a product of this size is divided."""
        tuning = TUNING[len(self.parts)]
        step_bytes = 2 * intrinsics.TILE * len(self.parts)
        divide_a = M > tuning.shared_rows or M >= N
        divided, other = (M, N) if divide_a else (N, M)
        k = min(K, max(1, MAX_SHARED // (-(-other // SIDE) * step_bytes * tuning.depth)) * tuning.depth * SIDE)
        all_steps = -(-k // SIDE)
        even = -(-divided // (workers * 2 * SIDE)) * SIDE  # two tasks per worker
        lines, depth = min(tuning.lines, even), min(tuning.depth, all_steps)
        shared = -(-other // SIDE) * all_steps * step_bytes
        a_panels = -(-(lines if divide_a else M) // SIDE)
        private = EDGE + ROW + (a_panels + 2) * BLOCK + lines // SIDE * depth * step_bytes
        return Blocking(divide_a, k, lines, depth, tuning.cached_steps, shared, -(-private // PAGE) * PAGE)


def _address(array: Float32 | None) -> int:
    return 0 if array is None else array.ctypes.data


def _grown(scratch: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    return scratch if scratch.size >= size + PAGE else np.empty(size + PAGE, np.uint8)


def _aligned(scratch: NDArray[np.uint8]) -> int:
    """Return the address of the first page in it."""
    return int(-(-scratch.ctypes.data // PAGE) * PAGE)
