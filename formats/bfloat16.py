"""Conversion between float32 and bfloat16, which is stored as uint16: the upper half of a float32."""

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 16
"""Number of elements converted at a time, so that the scratch buffer stays in the processor's cache."""


def to_float32(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """Convert ``bits`` to float32 in ``out``, of the same shape. The conversion is exact and preserves NaN payloads."""
    np.left_shift(bits, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def from_float32(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """Round ``values`` to bfloat16 in ``out``, to nearest with ties to even.

    Both arrays must be C-contiguous and have the same size. Values beyond the largest bfloat16 become infinite. A NaN
    becomes a quiet NaN with the upper part of its payload.
    """
    if not (values.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError("bfloat16.from_float32: expected C-contiguous arrays")
    words, flat = values.reshape(-1).view(np.uint32), out.reshape(-1)
    if words.size != flat.size:
        raise ValueError(f"bfloat16.from_float32: found {words.size} values, expected {flat.size}, the size of out")
    scratch = np.empty(min(CHUNK, words.size), np.uint32)
    for start in range(0, words.size, CHUNK):
        word = words[start : start + CHUNK]
        upper = scratch[: word.size]
        # Adding 0x7FFF, plus 1 if the upper half is odd, carries into the upper half exactly when rounding up.
        np.right_shift(word, 16, out=upper)
        upper &= 1
        upper += 0x7FFF
        upper += word
        upper >>= 16
        nan = (word & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            upper[nan] = (word[nan] >> 16) | 0x40
        flat[start : start + CHUNK] = upper
