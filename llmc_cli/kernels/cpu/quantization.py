"""Weights in bfloat16 and int8: conversion from and to float32.

bfloat16 is the upper 16 bits of a float32, rounded to nearest even. Two share a 32-bit word, so that a vector of
``LANES`` words is converted without permutation: of every 2 · LANES numbers the first half is stored in the lower
halves of LANES words, the second half in the upper halves. int8 is symmetric with one scale per row: a number is stored
as ``ZERO_POINT`` + number / scale, and the row's largest magnitude is 127 steps. Rows are padded with zeros.
"""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, float1, float2, helper, kernel, ubytes2, uint2
from llmc_cli.kernels.cpu.exponential import ROUNDER, ZERO, from_order_key, order_key
from llmc_cli.kernels.cpu.register_tiles import LANES

ZERO_POINT = np.float32(128.0)
STEPS = np.float32(127.0)  # to either side of zero
INFINITY = np.uint32(0x7F800000)  # larger patterns are NaNs
SIGN_OFF = np.uint32(0x7FFFFFFF)
UPPER = np.uint32(0xFFFF0000)
QUIET = np.uint32(0x40)  # a bit that keeps a NaN a NaN, and makes it a quiet one


@helper(CONTRACT)
def rounded(bits):
    """Return the bits of a bfloat16, from those of a float32."""
    upper = bits >> np.uint32(16)
    nan = (bits & SIGN_OFF) > INFINITY
    return upper | QUIET if nan else (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)


@kernel(uint2, uint2, fastmath=CONTRACT)
def round_rows(rows, bits):
    """rows (O,Kp/2), two bfloat16 per word, from bits (O,K), those of float32."""
    K = bits.shape[1]
    for o in prange(bits.shape[0]):
        for j in range(rows.shape[1]):
            low = j // LANES * 2 * LANES + j % LANES
            high = low + LANES
            first = rounded(bits[o, low]) if low < K else np.uint32(0)
            second = rounded(bits[o, high]) if high < K else np.uint32(0)
            rows[o, j] = first | (second << np.uint32(16))


@helper(CONTRACT, inline=False)
def largest_magnitude(row):
    """Return max|row|, or NaN if there is one."""
    largest = np.int32(0)
    for j in range(row.size):
        key = order_key(abs(row[j]))
        largest = key if key > largest else largest
    return from_order_key(largest)


@helper(CONTRACT, inline=False)
def quantize_row(steps, row, inverse):
    for j in range(row.size):
        steps[j] = np.int32((row[j] * inverse + ROUNDER) - ROUNDER + ZERO_POINT)


@kernel(ubytes2, float1, float2, fastmath=CONTRACT)
def quantize_rows(rows, scales, master):
    """int8 rows (O,Kp) and scales (O,) from master (O,K)."""
    K = master.shape[1]
    for o in prange(master.shape[0]):
        largest = largest_magnitude(master[o])
        scales[o] = largest / STEPS
        if largest > ZERO:  # else the row is zero, or the scale is NaN
            quantize_row(rows[o], master[o], STEPS / largest)
        else:
            rows[o, :K] = ZERO_POINT
        rows[o, K:] = ZERO_POINT


@helper(CONTRACT, inline=False)
def expand_row(row, steps, scale):
    for j in range(row.size):
        row[j] = (np.float32(steps[j]) - ZERO_POINT) * scale


@kernel(float2, ubytes2, float1, fastmath=CONTRACT)
def expand_int8(wide, rows, scales):
    """wide (O,K) = float32 from int8 rows (O,Kp) and scales (O,)."""
    for o in prange(wide.shape[0]):
        expand_row(wide[o], rows[o], scales[o])


@kernel(uint2, uint2, fastmath=CONTRACT)
def expand_bfloat16(wide, rows):
    """wide (O,K) = the bits of float32, from bfloat16 rows (O,Kp/2)."""
    for o in prange(wide.shape[0]):
        for j in range(wide.shape[1]):
            word = rows[o, j // (2 * LANES) * LANES + j % LANES]
            wide[o, j] = word & UPPER if j % (2 * LANES) >= LANES else word << np.uint32(16)
