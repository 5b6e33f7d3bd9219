"""What this machine can do at best, measured: the figures that speeds are shares of."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc_cli.device import Backend
from llmc_cli.kernels.spec import Kernels

MATMUL_SIZE = 1536
REPEATS = 3
CEILING_REPEATS = 10  # for what everything is a share of, also on a busy machine

SHAPES = ((1536, 1536, 1536), (2048, 2048, 2048), (1024, 3072, 768), (256, 12288, 768))  # N, O, I
BANDWIDTH_ELEMENTS = 1 << 25  # of each array: far more than caches hold


@dataclass(frozen=True)
class Ceilings:
    """``matmul``: FLOP/s by shape; ``memory``: bytes/s by kind of traffic, reads and writes added up."""

    precision: str
    matmul: dict[str, float]
    memory: dict[str, float]

    @property
    def flops(self) -> float:
        return max(self.matmul.values())

    @property
    def bandwidth(self) -> float:
        return max(self.memory.values())


def best_time(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of a few runs, after one that does not count."""
    run()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
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
    x, y = (kernels.alloc(shape, kernels.activation_dtype) for shape in ((N, I), (N, O)))
    w = kernels.alloc((O, I), kernels.dtype)
    generator = np.random.default_rng(0)
    for array in (x, w):
        kernels.upload(array, generator.standard_normal(array.shape, np.float32))
    weight = kernels.bind(w)
    kernels.publish([weight])

    def multiply() -> None:
        kernels.linear_forward(y, x, weight, None)
        kernels.synchronize()

    return 2 * N * O * I / best_time(multiply, repeats)


def memory_bandwidth(kernels: Kernels, threads: int, elements: int = BANDWIDTH_ELEMENTS) -> dict[str, float]:
    """Bytes/s of three kinds of traffic over arrays of ``elements`` random numbers.

    read: our sum of squares; copy: NumPy, a piece of the array on each thread; update: our AdamW, which reads four
    arrays and writes three.
    """
    from llmc_cli.workloads import adamw_arguments

    master, m, v, g, *rest = adamw_arguments(kernels, elements)
    out, size, repeats = kernels.alloc((1,), np.float64), g.nbytes, CEILING_REPEATS
    found = {"read": size / best_time(lambda: kernels.sum_squares(out, g), repeats)}
    with ThreadPoolExecutor(threads) as pool:  # NumPy copies without holding the interpreter's lock
        pieces = list(zip(np.array_split(m, threads), np.array_split(g, threads), strict=True))
        found["copy"] = 2 * size / best_time(lambda: list(pool.map(_copy, pieces)), repeats)
    found["update"] = 7 * size / best_time(lambda: kernels.adamw(master, m, v, g, *rest), repeats)
    return found


def _copy(pair: tuple[NDArray[np.floating], NDArray[np.floating]]) -> None:
    np.copyto(*pair)


def measure_ceilings(
    backend: Backend, shapes: tuple[tuple[int, int, int], ...] = SHAPES, elements: int = BANDWIDTH_ELEMENTS
) -> Ceilings:
    """Both kinds of ceilings; takes a few seconds, and seven arrays' worth of memory for a moment."""
    matmul = {" x ".join(map(str, shape)): matmul_flops(backend.kernels, *shape, CEILING_REPEATS) for shape in shapes}
    return Ceilings(backend.precision, matmul, memory_bandwidth(backend.kernels, backend.threads, elements))
