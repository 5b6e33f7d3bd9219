"""exp for float32 from additions, multiplications and shifts, so that LLVM vectorizes loops that contain it."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from llmc_cli.kernels.cpu.compiling import CONTRACT, helper

LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH = np.float32(0.693359375)  # so few bits that n · LN2_HIGH is exact
LN2_LOW = np.float32(-2.12194440e-4)
ROUNDER = np.float32(1.5 * 2**23)  # adding it rounds a small number to an integer, in the low bits
HIGHEST = np.float32(88.0)  # less than ln(largest float32)
LOWEST = np.float32(-87.0)  # greater than ln(smallest normal float32); exp of less is 0

# exp(r) = 1 + r + r² · polynomial, |r| ≤ ln(2)/2, near-minimax (S. L. Moshier, Cephes, expf)
P0 = np.float32(1.9875691500e-4)
P1 = np.float32(1.3981999507e-3)
P2 = np.float32(8.3334519073e-3)
P3 = np.float32(4.1665795894e-2)
P4 = np.float32(1.6666665459e-1)
P5 = np.float32(5.0000001201e-1)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)


@intrinsic
def power_of_two(typing_context: Any, rounded: Any) -> Any:
    """Return 2^n as float32, for ``rounded`` = ROUNDER + n, whose low bits hold the integer n."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        exponent = builder.shl(builder.bitcast(args[0], i32), ir.Constant(i32, 23))
        return builder.bitcast(builder.add(exponent, ir.Constant(i32, 127 << 23)), ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def order_key(typing_context: Any, x: Any) -> Any:
    """Return an int32 that sorts as the float32 x does, with positive NaN above everything. The mapping of the bits is
    its own inverse.

    LLVM vectorizes a maximum of integers, but one of floats only if NaN may be ignored.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        bits = builder.bitcast(args[0], i32)
        negative = builder.ashr(bits, ir.Constant(i32, 31))  # all ones or all zeros
        return builder.xor(bits, builder.and_(negative, ir.Constant(i32, 0x7FFFFFFF)))

    return types.int32(types.float32), generate


@intrinsic
def from_order_key(typing_context: Any, key: Any) -> Any:
    """Return the float32 with this ``order_key``."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i32 = ir.IntType(32)
        negative = builder.ashr(args[0], ir.Constant(i32, 31))
        bits = builder.xor(args[0], builder.and_(negative, ir.Constant(i32, 0x7FFFFFFF)))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


@helper(CONTRACT)  # no reassociation: (x + ROUNDER) - ROUNDER must stay
def exp(x):
    """Return e^x within 1 unit in the last place; 0 for x < -87, e^88 for x > 88, NaN for NaN."""
    clipped = HIGHEST if x > HIGHEST else x
    rounded = clipped * LOG2_E + ROUNDER
    n = rounded - ROUNDER
    r = clipped - n * LN2_HIGH - n * LN2_LOW
    p = P0
    p = p * r + P1
    p = p * r + P2
    p = p * r + P3
    p = p * r + P4
    p = p * r + P5
    result = (p * (r * r) + r + ONE) * power_of_two(rounded)
    return ZERO if x < LOWEST else result
