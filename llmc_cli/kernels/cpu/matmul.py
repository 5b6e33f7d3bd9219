"""What multiplies matrices: an object that has a name and scratch memory. BLAS is the one that is always there."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.cpu import blas

Float32 = NDArray[np.float32]


class Matmul(Protocol):
    """Scratch memory grows to the largest call and stays."""

    name: str
    """In words, for people."""

    def __call__(
        self, c: Float32, a: Float32, b: Float32, transpose_a: bool, transpose_b: bool, acc: bool, bias: Float32 | None
    ) -> None:
        """c (M,N) = a · b + bias (N,), or added to c with ``acc``, where there is no bias; a is (M,K), or (K,M) to be
        transposed, b (K,N) or (N,K). Rows of all three may be further apart than they are long."""

    def scratch_bytes(self) -> int:
        """Bytes of scratch memory held now."""

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        """Bytes of scratch memory that products of these sizes (M, N, K) come to."""


class BlasMatmul:
    """Float32 as it is."""

    def __init__(self) -> None:
        self.name = blas.name()

    def __call__(
        self, c: Float32, a: Float32, b: Float32, transpose_a: bool, transpose_b: bool, acc: bool, bias: Float32 | None
    ) -> None:
        blas.matmul(c, a, b, transpose_a, transpose_b, acc, bias)

    def scratch_bytes(self) -> int:
        return 0

    def workspace_bytes(self, sizes: list[tuple[int, int, int]], threads: int) -> int:
        return 0
