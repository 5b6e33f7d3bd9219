"""Peak FLOP/s of a matrix product, measured."""

import time
from collections.abc import Callable

from llmc_cli.kernels.spec import Kernels

MATMUL_SIZE = 1536


REPEATS = 3


LAUNCH_S = 1e-3  # a product that takes less says how fast it is started, too


LARGE_MATMUL = 8192


def best_time(kernels: Kernels, run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of a few runs, until what they ask ``kernels`` for is done, after one that does not
    count."""
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
    """FLOP/s of a large matmul of random numbers, the best of a few runs; takes about 0.1 s."""
    from llmc_cli.kernels.random_arrays import fill

    x, y = (kernels.alloc(shape, kernels.activation_dtype) for shape in ((N, I), (N, O)))
    w = kernels.alloc((O, I), kernels.dtype)
    for array in (x, w):
        fill(kernels, array)
    weight = kernels.bind(w)
    kernels.publish([weight])
    return 2 * N * O * I / best_time(kernels, lambda: kernels.linear_forward(y, x, weight, None), repeats)


def peak_flops(kernels: Kernels) -> float:
    """FLOP/s of a matmul that is large enough for what computes here."""
    found = matmul_flops(kernels)
    if 2 * MATMUL_SIZE**3 / found < LAUNCH_S:
        found = matmul_flops(kernels, LARGE_MATMUL, LARGE_MATMUL, LARGE_MATMUL)
    kernels.release_memory()
    return found
