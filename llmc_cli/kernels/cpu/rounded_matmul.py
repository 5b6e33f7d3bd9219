"""bf16 matrix products for processors without bf16 tiles: the operands are rounded to bf16 and multiplied in float32 by
BLAS.

This is slower than float32, but gives the results of a machine with bf16 products, up to the order of sums.
"""

import numpy as np
from numba import prange
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from llmc_cli.kernels.cpu import blas, linear
from llmc_cli.kernels.cpu.compiling import CONTRACT, helper, int64, kernel, uint1, uint2
from llmc_cli.kernels.cpu.matmul import apply_gelu

Float32 = NDArray[np.float32]
HALF = np.uint32(0x7FFF)
UPPER = np.uint32(0xFFFF0000)
INFINITY = np.uint32(0x7F800000)  # larger patterns are NaNs, which rounding up could turn into zero
SIGN = np.uint32(0x80000000)


@helper(CONTRACT, inline=False)
def round_row(to, row):
    for j in range(to.size):
        bits = row[j]
        odd = (bits >> np.uint32(16)) & np.uint32(1)  # ties are rounded to even
        nan = (bits & ~SIGN) > INFINITY
        to[j] = bits if nan else (bits + HALF + odd) & UPPER


@kernel(uint2, uint1, int64, fastmath=CONTRACT)
def round_rows(to, x, stride):
    """to (rows,columns) = x rounded to bf16, both as the bits of float32; x is flat, with rows ``stride`` apart."""
    rows, columns = to.shape
    for i in prange(rows):
        round_row(to[i], x[i * stride : i * stride + columns])


class RoundedMatmul:
    """``matmul.Matmul`` with operands rounded to bf16."""

    head_rows = 512

    def __init__(self) -> None:
        self.name = f"bf16 operands, float32 products by {blas.name()}: no bf16 tiles (AMX) here"
        self._scratch = [np.empty(0, np.float32), np.empty(0, np.float32)]

    def __call__(
        self, c: Float32, a: Float32, b: Float32, *, transpose_a: bool = False, transpose_b: bool = False,
        acc: bool = False, bias: Float32 | None = None,
        act: Float32 | None = None, pre: Float32 | None = None, dbias: Float32 | None = None,
    ) -> None:  # fmt: skip
        if dbias is not None:
            linear.sum_rows(dbias, a, acc)
        blas.matmul(c, self._rounded(0, a), self._rounded(1, b), transpose_a, transpose_b, acc, bias)
        apply_gelu(c, act, pre)

    def _rounded(self, operand: int, x: Float32) -> Float32:
        """Return x rounded to bf16, in the scratch memory of this operand (0 or 1)."""
        if self._scratch[operand].size < x.size:
            self._scratch[operand] = np.empty(x.size, np.float32)
        rounded = self._scratch[operand][: x.size].reshape(x.shape)
        stride = x.strides[0] // 4
        flat = as_strided(x, ((len(x) - 1) * stride + x.shape[1],), (4,))
        round_rows(rounded.view(np.uint32), flat.view(np.uint32), stride)
        return rounded

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        return 4 * (max(M * K for M, _, K in sizes) + max(K * N for _, N, K in sizes))
