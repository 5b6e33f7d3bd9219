"""The products of bf16 where nothing multiplies bf16: the numbers are rounded to it, and multiplied by BLAS in float32.

That is slower than float32, but gives what a faster machine gives, up to the order of sums.
"""

import numpy as np
from numba import prange
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from llmc_cli.kernels.cpu import blas, linear
from llmc_cli.kernels.cpu.compiling import CONTRACT, helper, int64, kernel, uint1, uint2
from llmc_cli.kernels.cpu.matmul import activate

Float32 = NDArray[np.float32]
HALF = np.uint32(0x7FFF)
UPPER = np.uint32(0xFFFF0000)
LARGEST = np.uint32(0x7F800000)  # infinity: above it are NaNs, whose last bits may not be rounded up
SIGN = np.uint32(0x80000000)


@helper(CONTRACT, inline=False)
def round_row(to, row):
    for j in range(to.size):
        bits = row[j]
        odd = (bits >> np.uint32(16)) & np.uint32(1)  # a tie goes to the even one
        nan = (bits & ~SIGN) > LARGEST
        to[j] = bits if nan else (bits + HALF + odd) & UPPER


@kernel(uint2, uint1, int64, fastmath=CONTRACT)
def round_rows(to, x, distance):
    """to (rows,columns) = the bits of rows of x, ``distance`` apart, rounded to bf16."""
    rows, columns = to.shape
    for i in prange(rows):
        round_row(to[i], x[i * distance : i * distance + columns])


class RoundedMatmul:
    """``matmul.Matmul`` of numbers rounded to bf16."""

    head_rows = 512

    def __init__(self) -> None:
        self.name = f"bf16 operands, float32 products by {blas.name()}: no bf16 tiles (AMX) here"
        self._scratch = [np.empty(0, np.float32), np.empty(0, np.float32)]

    def __call__(
        self, c: Float32, a: Float32, b: Float32, transpose_a: bool, transpose_b: bool, acc: bool, bias: Float32 | None,
        act: Float32 | None = None, pre: Float32 | None = None, line_sums: Float32 | None = None,
    ) -> None:  # fmt: skip
        if line_sums is not None:
            linear.sum_rows(line_sums, a, acc)
        blas.matmul(c, self._rounded(0, a), self._rounded(1, b), transpose_a, transpose_b, acc, bias)
        activate(c, act, pre)

    def _rounded(self, which: int, x: Float32) -> Float32:
        """x in scratch memory."""
        if self._scratch[which].size < x.size:
            self._scratch[which] = np.empty(x.size, np.float32)
        rounded = self._scratch[which][: x.size].reshape(x.shape)
        distance = x.strides[0] // 4
        flat = as_strided(x, ((len(x) - 1) * distance + x.shape[1],), (4,))
        round_rows(rounded.view(np.uint32), flat.view(np.uint32), distance)
        return rounded

    def scratch_bytes(self) -> int:
        return sum(array.nbytes for array in self._scratch)

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        return 4 * (max(M * K for M, _, K in sizes) + max(K * N for _, N, K in sizes))
