"""Matrices in less than float32: bfloat16 and int8 made of float32, and float32 made of them.

bfloat16 is the upper 16 bits, rounded to the nearest, of two equally near to the even one. Two share a word, so that
``LANES`` words are widened without moving a number: of every 2·LANES numbers the first half lies in the lower halves of
LANES words, the second half in the upper ones. int8 is steps of a row's scale, symmetric: a row's largest number is 127
steps from ``MIDDLE``, which stands for 0. Rows are padded with zeros.
"""

import numpy as np
from numba import prange

from llmc_cli.kernels.cpu.compiling import CONTRACT, float1, float2, helper, kernel, ubytes2, uint2
from llmc_cli.kernels.cpu.exponential import ROUNDER, ZERO, from_order_key, order_key
from llmc_cli.kernels.cpu.register_tiles import LANES

MIDDLE = np.float32(128.0)
STEPS = np.float32(127.0)  # to either side of it
EXPONENT = np.uint32(0x7F800000)  # all of it set: infinity, or NaN where more bits are
SIGN_OFF = np.uint32(0x7FFFFFFF)
UPPER = np.uint32(0xFFFF0000)
QUIET = np.uint32(0x40)  # the bit that keeps a NaN one, and a quiet one


@helper(CONTRACT)
def rounded(bits):
    """The upper 16 of a float32's bits, rounded."""
    upper = bits >> np.uint32(16)
    nan = (bits & SIGN_OFF) > EXPONENT
    return upper | QUIET if nan else (bits + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)


@kernel(uint2, uint2, fastmath=CONTRACT)
def round_rows(rows, bits):
    """rows (O,Kp/2), two bfloat16 to a word, of bits (O,K), those of float32."""
    K = bits.shape[1]
    for o in prange(bits.shape[0]):
        for j in range(rows.shape[1]):
            low = j // LANES * 2 * LANES + j % LANES
            high = low + LANES
            first = rounded(bits[o, low]) if low < K else np.uint32(0)
            second = rounded(bits[o, high]) if high < K else np.uint32(0)
            rows[o, j] = first | (second << np.uint32(16))


@helper(CONTRACT, inline=False)
def largest_of(row):
    """max|row|; NaN where there is one."""
    largest = np.int32(0)
    for j in range(row.size):
        key = order_key(abs(row[j]))
        largest = key if key > largest else largest
    return from_order_key(largest)


@helper(CONTRACT, inline=False)
def quantize_row(steps, row, inverse):
    for j in range(row.size):
        steps[j] = np.int32((row[j] * inverse + ROUNDER) - ROUNDER + MIDDLE)


@kernel(ubytes2, float1, float2, fastmath=CONTRACT)
def quantize_rows(rows, scales, master):
    """rows (O,Kp) steps and scales (O,) of master (O,K)."""
    K = master.shape[1]
    for o in prange(master.shape[0]):
        largest = largest_of(master[o])
        scales[o] = largest / STEPS
        if largest > ZERO:  # of what is not finite the scale says it
            quantize_row(rows[o], master[o], STEPS / largest)
        else:
            rows[o, :K] = MIDDLE
        rows[o, K:] = MIDDLE


@helper(CONTRACT, inline=False)
def expand_row(row, steps, scale):
    for j in range(row.size):
        row[j] = (np.float32(steps[j]) - MIDDLE) * scale


@kernel(float2, ubytes2, float1, fastmath=CONTRACT)
def expand_steps(wide, rows, scales):
    """wide (O,K) = what rows (O,Kp) and scales (O,) stand for."""
    for o in prange(wide.shape[0]):
        expand_row(wide[o], rows[o], scales[o])


@kernel(uint2, uint2, fastmath=CONTRACT)
def expand_bfloat16(wide, rows):
    """wide (O,K), the bits of float32, of rows (O,Kp/2)."""
    for o in prange(wide.shape[0]):
        for j in range(wide.shape[1]):
            word = rows[o, j // (2 * LANES) * LANES + j % LANES]
            wide[o, j] = word & UPPER if j % (2 * LANES) >= LANES else word << np.uint32(16)
