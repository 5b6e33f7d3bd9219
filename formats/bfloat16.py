"""bfloat16 as uint16 bits: the upper half of a float32."""

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 16
"""Elements converted at a time: the scratch stays in the processor's cache."""


def to_float32(bits: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """out (any shape, float32) = the values of bits (same shape), exactly; NaN payloads are kept."""
    np.left_shift(bits, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)


def from_float32(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    """out (uint16 bits) = values rounded to the nearest, ties to even, in chunks; both C-contiguous, of one size.

    Beyond the largest bfloat16 the result is infinite. A NaN stays one (quiet, with the upper part of its payload).
    """
    if not (values.flags.c_contiguous and out.flags.c_contiguous):
        raise ValueError("bfloat16.from_float32 needs C-contiguous arrays")
    words, flat = values.reshape(-1).view(np.uint32), out.reshape(-1)
    if words.size != flat.size:
        raise ValueError(f"bfloat16.from_float32: {words.size} values into {flat.size}")
    scratch = np.empty(min(CHUNK, words.size), np.uint32)
    for start in range(0, words.size, CHUNK):
        word = words[start : start + CHUNK]
        upper = scratch[: word.size]
        # Adding just under half a unit, and one more where the kept part is odd, carries exactly when it must.
        np.right_shift(word, 16, out=upper)
        upper &= 1
        upper += 0x7FFF
        upper += word
        upper >>= 16
        nan = (word & 0x7FFFFFFF) > 0x7F800000
        if nan.any():
            upper[nan] = (word[nan] >> 16) | 0x40
        flat[start : start + CHUNK] = upper
