"""What this machine can do at best, measured: the figures that speeds are shares of."""

import time

import numpy as np

from llmc_cli.kernels.spec import Kernels

MATMUL_SIZE = 1536
REPEATS = 3


def matmul_flops(kernels: Kernels) -> float:
    """FLOP/s of a large square matmul of random numbers, the best of a few runs; takes about 0.1 s."""
    n = MATMUL_SIZE
    x, w, y = (kernels.alloc((n, n), kernels.dtype) for _ in range(3))
    generator = np.random.default_rng(0)
    x[:] = generator.standard_normal((n, n), np.float32)
    w[:] = generator.standard_normal((n, n), np.float32)
    weight = kernels.bind(w)
    best = float("inf")
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        kernels.linear_forward(y, x, weight, None)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
