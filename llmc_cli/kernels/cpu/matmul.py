"""The interface of matrix multiplication, and its implementation by BLAS."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.cpu import blas, linear

Float32 = NDArray[np.float32]


class Matmul(Protocol):
    """A way to multiply float32 matrices. Its scratch memory grows to the largest call."""

    name: str
    """Description for the user."""

    head_rows: int
    """Rows of logits per chunk of ``head_loss``: more rows make the products faster and take more memory."""

    def __call__(
        self, c: Float32, a: Float32, b: Float32, *, transpose_a: bool = False, transpose_b: bool = False,
        acc: bool = False, bias: Float32 | None = None,
        act: Float32 | None = None, pre: Float32 | None = None, dbias: Float32 | None = None,
    ) -> None:  # fmt: skip
        """c (M,N) = a (M,K) · b (K,N) + bias (N,), overwritten, or with ``acc`` c += a · b, without bias.

        With ``transpose_a`` a is (K,M), with ``transpose_b`` b is (N,K). The rows of c, a and b may be strided.
        act (M,N) = gelu(c), overwritten. With pre (M,N), c is multiplied by gelu'(pre) at the end. With either, c must
        be contiguous. dbias (M,) = the sum of a (K,M) over k, the gradient of a bias; it needs ``transpose_a`` and a
        contiguous a, and is overwritten, or added to with ``acc``.
        """

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        """Return the scratch memory in bytes that products of these sizes (M, N, K) need."""


def apply_gelu(c: Float32, act: Float32 | None, pre: Float32 | None) -> None:
    """Compute the ``act`` and ``pre`` options of ``Matmul`` in a separate pass over c."""
    if act is not None:
        linear.gelu_forward(act.reshape(-1), c.reshape(-1))
    if pre is not None:
        linear.gelu_backward(c.reshape(-1), pre.reshape(-1))


class BlasMatmul:
    """``Matmul`` in float32 by BLAS."""

    head_rows = 1024

    def __init__(self) -> None:
        self.name = blas.name()

    def __call__(
        self, c: Float32, a: Float32, b: Float32, *, transpose_a: bool = False, transpose_b: bool = False,
        acc: bool = False, bias: Float32 | None = None,
        act: Float32 | None = None, pre: Float32 | None = None, dbias: Float32 | None = None,
    ) -> None:  # fmt: skip
        if dbias is not None:
            linear.sum_rows(dbias, a, acc)
        blas.matmul(c, a, b, transpose_a, transpose_b, acc, bias)
        apply_gelu(c, act, pre)

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        return 0
