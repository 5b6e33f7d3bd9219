"""Packing float32 matrices of any size into panels for AMX tiles (see intrinsics.py), and other uses of addresses."""

from typing import NamedTuple

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from llmc_cli.kernels.cpu.amx import intrinsics
from llmc_cli.kernels.cpu.compiling import CONTRACT, helper

SIDE = intrinsics.SIDE
BLOCK = SIDE * SIDE * 4  # bytes of 32 x 32 float32
ROW = SIDE * 4  # bytes of a row of a block
EDGE = 2048  # bytes of scratch memory to pad an incomplete tile: 512 float32


class Operand(NamedTuple):
    """A float32 operand of a matrix product, in memory."""

    address: int
    stride: int  # bytes from row to row
    k_contiguous: bool  # k runs along the rows, else across them


@helper(CONTRACT)
def matrix(address, rows, columns):
    return carray(intrinsics.pointer(address), (rows, columns), np.float32)


@helper(CONTRACT)
def vector(address, size):
    return carray(intrinsics.pointer(address), (size,), np.float32)


@helper(CONTRACT, inline=False)
def copy(to, to_stride, source, stride, rows, columns):
    """Copy ``rows`` rows of ``columns`` floats."""
    for i in range(rows):
        for j in range(columns):
            intrinsics.store_float(to + i * to_stride + j * 4, intrinsics.load_float(source + i * stride + j * 4))


@helper(CONTRACT, inline=False)
def copy_block(to, to_stride, source, stride, rows, columns):
    """Copy the part (rows,columns) of a block; a whole block is copied by vectors."""
    if rows == SIDE and columns == SIDE:
        intrinsics.put_block(to, to_stride, 0, 0, source, stride, False)
    else:
        copy(to, to_stride, source, stride, rows, columns)


@helper(CONTRACT, inline=False)
def pack(to, panel_bytes, source, is_b, outer, depth, first, last, edge, parts):
    """Pack ``outer`` rows of an operand a, or columns of b, and ``depth`` k into panels, padded with zeros.

    The panels start at ``to``, ``panel_bytes`` apart. The work is the pairs of a panel and a step of 32 k; this call
    packs the pairs ``first`` to ``last`` - 1, in the order in which they lie in ``source``. ``edge`` is scratch memory
    of EDGE bytes.
    """
    along, stride = source.k_contiguous, source.stride
    steps = (depth + SIDE - 1) // SIDE
    panels = (outer + SIDE - 1) // SIDE
    for n in range(first, last):
        p, s = (n // steps, n % steps) if along else (n % panels, n // panels)
        k = min(SIDE, depth - s * SIDE)
        for half in range(2):
            line = p * SIDE + half * 16
            lines = max(0, min(16, outer - line))
            at = source.address + (line * stride + s * ROW if along else s * SIDE * stride + line * 4)
            distance = stride
            if lines < 16 or k < SIDE:
                for i in range(0, EDGE, 4):
                    intrinsics.store_float(edge + i, np.float32(0.0))
                distance = 128 if along else 64
                copy(edge, distance, at, stride, lines if along else k, k if along else lines)
                at = edge
            target = to + p * panel_bytes + s * 2 * intrinsics.TILE * len(parts) + half * intrinsics.TILE
            if is_b:
                if along:
                    intrinsics.pack_b_along(target, at, distance, parts)
                else:
                    intrinsics.pack_b_across(target, at, distance, parts)
            elif along:
                intrinsics.pack_a_along(target, at, distance, parts)
            else:
                intrinsics.pack_a_across(target, at, distance, parts)
