"""What multiplies matrices: an object that has a name and scratch memory. BLAS is the one that is always there."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.cpu import blas, linear

Float32 = NDArray[np.float32]


class Matmul(Protocol):
    """Scratch memory grows to the largest call and stays."""

    name: str
    """In words, for people."""

    head_rows: int
    """Rows of logits at a time: with more the products are faster, and the logits take more memory."""

    def __call__(
        self, c: Float32, a: Float32, b: Float32, transpose_a: bool, transpose_b: bool, acc: bool, bias: Float32 | None,
        act: Float32 | None = None, pre: Float32 | None = None, line_sums: Float32 | None = None,
    ) -> None:  # fmt: skip
        """c (M,N) = a · b + bias (N,), or added to c with ``acc``, where there is no bias; a is (M,K), or (K,M) to be
        transposed, b (K,N) or (N,K). Rows of all three may be further apart than they are long. With act (M,N) also
        act = gelu(c), or with pre (M,N) c is multiplied by gelu'(pre) at the end; c is contiguous then. With line_sums
        (M,) also the sum over k of a given as (K,M), contiguous, overwritten or added to as c is."""

    def scratch_bytes(self) -> int:
        """Bytes of scratch memory held now."""

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        """Bytes of scratch memory that products of these sizes (M, N, K) come to."""


def activate(c: Float32, act: Float32 | None, pre: Float32 | None) -> None:
    """What stands behind a product, in a pass of its own."""
    if act is not None:
        linear.gelu_forward(act.reshape(-1), c.reshape(-1))
    if pre is not None:
        linear.gelu_backward(c.reshape(-1), pre.reshape(-1))


class BlasMatmul:
    """Float32 as it is."""

    head_rows = 1024

    def __init__(self) -> None:
        self.name = blas.name()

    def __call__(
        self, c: Float32, a: Float32, b: Float32, transpose_a: bool, transpose_b: bool, acc: bool, bias: Float32 | None,
        act: Float32 | None = None, pre: Float32 | None = None, line_sums: Float32 | None = None,
    ) -> None:  # fmt: skip
        if line_sums is not None:
            linear.sum_rows(line_sums, a, acc)
        blas.matmul(c, a, b, transpose_a, transpose_b, acc, bias)
        activate(c, act, pre)

    def scratch_bytes(self) -> int:
        return 0

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        return 0
