"""Measure the peak FLOP/s of matrix products."""

import time
from collections.abc import Callable

from llmc_cli.kernels.spec import Kernels

MATMUL_SIZE = 1536
LARGE_MATMUL_SIZE = 8192  # for GPUs
MIN_SECONDS = 1e-3  # a product faster than this is dominated by launch overhead
REPEATS = 3


def best_time(kernels: Kernels, run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the seconds of the fastest of ``repeats`` runs, synchronization included, after one untimed run."""
    run()
    kernels.synchronize()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        kernels.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def matmul_flops(
    kernels: Kernels,
    N: int = MATMUL_SIZE,
    O: int = MATMUL_SIZE,  # noqa: E741
    I: int = MATMUL_SIZE,  # noqa: E741
    repeats: int = REPEATS,
) -> float:
    """Return the FLOP/s of (N,I) · (O,I)ᵀ with random numbers, the best of ``repeats`` runs; takes about 0.1 s."""
    from llmc_cli.kernels.random_arrays import fill

    x, y = (kernels.alloc(shape, kernels.activation_dtype) for shape in ((N, I), (N, O)))
    w = kernels.alloc((O, I), kernels.dtype)
    for array in (x, w):
        fill(kernels, array)
    weight = kernels.bind(w)
    kernels.publish([weight])
    return 2 * N * O * I / best_time(kernels, lambda: kernels.linear_forward(y, x, weight, None), repeats)


def peak_flops(kernels: Kernels) -> float:
    """Return the FLOP/s of a square matrix product that is large enough to saturate the device."""
    flops = matmul_flops(kernels)
    if 2 * MATMUL_SIZE**3 / flops < MIN_SECONDS:
        flops = matmul_flops(kernels, LARGE_MATMUL_SIZE, LARGE_MATMUL_SIZE, LARGE_MATMUL_SIZE)
    kernels.release_memory()
    return flops
