"""Conversion between float32 and bfloat16."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc_cli.formats import bfloat16


def to_bits(values):
    values = np.asarray(values, np.float32)
    out = np.zeros(values.shape, np.uint16)
    bfloat16.from_float32(values, out)
    return out


def to_floats(bits):
    bits = np.asarray(bits, np.uint16)
    out = np.full(bits.shape, np.nan, np.float32)
    bfloat16.to_float32(bits, out)
    return out


def test_golden_bits():
    words = np.array(
        [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000, 0x7F7FFFFF, 0x00008000, 0x80000000],
        np.uint32,
    )
    expected = [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F80, 0xBF82, 0x7F80, 0x0000, 0x8000]
    assert to_bits(words.view(np.float32)).tolist() == expected


def test_all_bit_patterns_round_trip_with_signaling_nans_made_quiet():
    bits = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    signalling = ((bits & 0x7F80) == 0x7F80) & ((bits & 0x7F) != 0)
    assert np.array_equal(to_bits(to_floats(bits)), np.where(signalling, bits | 0x40, bits))


def test_nan_with_payload_in_the_lower_half_stays_nan():
    words = np.array([0x7F800001, 0xFF80FFFF, 0x7FFFFFFF], np.uint32)
    assert to_bits(words.view(np.float32)).tolist() == [0x7FC0, 0xFFC0, 0x7FFF]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_rounds_to_nearest_with_ties_to_even(value):
    """Compare with exact fractions: no neighbor is nearer, and a tie goes to the even neighbor."""
    (bits,) = to_bits([value]).tolist()

    def exact(magnitude):
        if magnitude == 0x7F80:  # overflow is rounded against the next power of two
            return Fraction(2) ** 128
        return Fraction(struct.unpack("<f", struct.pack("<I", magnitude << 16))[0])

    target, magnitude = abs(Fraction(value)), bits & 0x7FFF
    assert (bits >> 15) == (math.copysign(1, value) < 0)
    error = abs(exact(magnitude) - target)
    for other in (magnitude - 1, magnitude + 1):
        if 0 <= other <= 0x7F80:
            distance = abs(exact(other) - target)
            assert error < distance or (error == distance and magnitude % 2 == 0)


def test_more_than_one_chunk_in_any_shape():
    values = np.random.default_rng(0).standard_normal((3, bfloat16.CHUNK // 2 + 1)).astype(np.float32)
    bits = to_bits(values)
    assert bits.shape == values.shape
    assert np.array_equal(bits.reshape(-1)[-3:], to_bits(values.reshape(-1)[-3:]))
    assert (np.abs(to_floats(bits) - values) <= np.abs(values) * 2**-8).all()


def test_invalid_arguments_raise():
    with pytest.raises(ValueError, match="C-contiguous"):
        bfloat16.from_float32(np.zeros((2, 3), np.float32).T, np.zeros((3, 2), np.uint16))
    with pytest.raises(ValueError, match="found 3 values, expected 2"):
        bfloat16.from_float32(np.zeros(3, np.float32), np.zeros(2, np.uint16))
