"""An emulation of the intrinsics of ``kernels/cpu/amx`` by plain loops over the same bytes, for machines without AMX.

``emulated`` returns modules of kernels compiled with it.
"""

import importlib
import sys
import types

import numpy as np
import pytest
from llvmlite import ir
from numba import carray, njit
from numba.core.types import int64, voidptr
from numba.extending import intrinsic

from llmc_cli.kernels.cpu import amx, compiling, loading
from llmc_cli.kernels.cpu.amx import intrinsics


@intrinsic
def pointer(typing_context, address):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return voidptr(int64), generate


@njit
def halves(address, count):
    return carray(pointer(address), (count,), np.uint16)


@njit
def floats(address, count):
    return carray(pointer(address), (count,), np.float32)


@njit
def pack(to, source, stride, parts, along, is_b):
    number = np.empty(1, np.float32)
    bits = number.view(np.uint32)
    for line in range(16):
        for k in range(32):
            at = source + (line * stride + k * 4 if along else k * stride + line * 4)
            number[0] = floats(at, 1)[0]
            for part in range(len(parts)):
                exact = number[0]
                bits[0] = (bits[0] + np.uint32(0x7FFF) + ((bits[0] >> np.uint32(16)) & np.uint32(1))) & 0xFFFF0000
                place = (k // 2) * 64 + line * 4 + (k % 2) * 2 if is_b else line * 64 + k * 2
                halves(to + part * 2 * intrinsics.TILE + place, 1)[0] = bits[0] >> np.uint32(16)
                number[0] = exact - number[0]


@njit
def pack_a_along(to, source, stride, parts):
    pack(to, source, stride, parts, True, False)


@njit
def pack_a_across(to, source, stride, parts):
    pack(to, source, stride, parts, False, False)


@njit
def pack_b_along(to, source, stride, parts):
    pack(to, source, stride, parts, True, True)


@njit
def pack_b_across(to, source, stride, parts):
    pack(to, source, stride, parts, False, True)


@njit
def unpack(to, panel, is_b):
    """to (32 rows or columns, 32 k) = one part of one step of a panel, in float32."""
    bits = to.view(np.uint32)
    for line in range(32):
        for k in range(32):
            place = k // 2 * 64 + line % 16 * 4 + k % 2 * 2 if is_b else line % 16 * 64 + k * 2
            bits[line, k] = np.uint32(halves(panel + line // 16 * intrinsics.TILE + place, 1)[0]) << np.uint32(16)


@njit
def multiply_block(to, to_stride, source, source_stride, a, b, steps, parts):
    """Add the products of all parts that are not negligible, in another order than the processor."""
    count = len(parts)
    left, right = np.empty((2, 32, 32), np.float32)
    total = np.zeros((32, 32), np.float32)
    if source != 0:
        for i in range(32):
            total[i] = floats(source + i * source_stride, 32)
    for step in range(steps):
        for p in range(count):
            for q in range(count - p):
                unpack(left, a + (step * count + p) * 2 * intrinsics.TILE, False)
                unpack(right, b + (step * count + q) * 2 * intrinsics.TILE, True)
                for i in range(32):
                    for j in range(32):
                        for k in range(32):
                            total[i, j] += left[i, k] * right[j, k]
    for i in range(32):
        floats(to + i * to_stride, 32)[:] = total[i]


@njit
def put_block(to, to_stride, source, source_stride, block, block_stride, stream):
    for i in range(32):
        numbers = floats(block + i * block_stride, 32).copy()
        if source != 0:
            numbers += floats(source + i * source_stride, 32)
        floats(to + i * to_stride, 32)[:] = numbers


@njit
def configure():
    pass


@njit
def release():
    pass


@njit
def transpose_block(to, to_stride, source):
    for i in range(32):
        floats(to + i * to_stride, 32)[:] = matrix(source)[:, i]


@njit
def matrix(address):
    return carray(pointer(address), (32, 32), np.float32)


@njit
def exponentials(to, scores, blocks, shifts, totals, factor):
    """Compute in double precision, then round."""
    values = np.empty((32, 32), np.float32)
    address = values.ctypes.data
    shift, total = floats(shifts, 32), floats(totals, 32)
    for block in range(blocks):
        values[:] = matrix(scores + block * 4096)
        for i in range(32):
            for j in range(32):
                values[i, j] = np.exp2(np.float64(values[i, j]) * factor + shift[j])
                total[j] += values[i, j]
        for half in range(2):
            pack_b_across(to + (2 * block + half) * intrinsics.TILE, address + half * 64, 128, (0,))


@njit
def score_gradients(probabilities, gradients, across, scores, dscores, shifts, deltas, factor, scale):
    values, dscore_values = np.empty((32, 32), np.float32), np.empty((32, 32), np.float32)
    shift, delta = floats(shifts, 32), floats(deltas, 32)
    for i in range(32):
        for j in range(32):
            values[i, j] = np.exp2(np.float64(matrix(scores)[i, j]) * factor + shift[j])
            dscore_values[i, j] = values[i, j] * (matrix(dscores)[i, j] - delta[j]) * scale
    for half in range(2):
        tile = half * intrinsics.TILE
        pack_a_along(probabilities + tile, values.ctypes.data + half * 2048, 128, (0,))
        pack_a_along(gradients + tile, dscore_values.ctypes.data + half * 2048, 128, (0,))
        pack_b_across(across + tile, dscore_values.ctypes.data + half * 64, 128, (0,))


EMULATED = (pack_a_along, pack_a_across, pack_b_along, pack_b_across, multiply_block, put_block, transpose_block,
           configure, release)  # fmt: skip
MODULES = ("panels", "matmul", "attention")


def emulated():
    """Return second copies of the modules ``MODULES``, by name, on emulated tiles. They are not cached on disk, and
    ``sys.modules`` keeps the real ones."""
    loading.load(loading.KERNELS)  # first, so that only emulated kernels are registered below
    tiles = types.ModuleType("emulated_amx")
    vars(tiles).update(vars(intrinsics))
    vars(tiles).update({function.__name__: function for function in EMULATED}, available=lambda: True)
    softmax = types.ModuleType("emulated_softmax")
    softmax.exponentials, softmax.score_gradients = exponentials, score_gradients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amx, "intrinsics", tiles)
        patch.setattr(amx, "softmax", softmax, raising=False)
        for name in MODULES:
            patch.setitem(sys.modules, f"{amx.__name__}.{name}", None)  # restored or removed at the end
            patch.setattr(amx, name, None, raising=False)
            del sys.modules[f"{amx.__name__}.{name}"]
        modules = {name: importlib.import_module(f"{amx.__name__}.{name}") for name in MODULES}
        compiling.compile_registered(None)
        return modules


def emulated_matmul(matmul, parts):
    """Return ``TileMatmul(parts)`` of the emulated module ``matmul``."""
    matmul.register_product(parts)
    compiling.compile_registered(None)
    return matmul.TileMatmul(parts)
