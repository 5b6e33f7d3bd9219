"""What this machine can do at best, measured: the figures that speeds are shares of."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.backend import Backend
from llmc_cli.kernels.spec import Array, Kernels

MATMUL_SIZE = 1536
REPEATS = 3
CEILING_REPEATS = 10  # for what everything is a share of, also on a busy machine

SHAPES = ((1536, 1536, 1536), (2048, 2048, 2048), (1024, 3072, 768), (256, 12288, 768))  # N, O, I
BANDWIDTH_ELEMENTS = 1 << 25  # of each array: far more than caches hold

# of a GPU, on which the same would be over before it has well begun
CUDA_SHAPES = ((8192, 8192, 8192), (4096, 4096, 4096), (16384, 3072, 768), (4096, 50304, 768))
CUDA_ELEMENTS = 1 << 28
CUDA_MEMORY = 32  # bytes that must be free for each of these, or there are fewer: four arrays are half of that
LAUNCH_S = 1e-3  # a product that takes less says how fast it is started, too
LARGE_MATMUL = 8192


@dataclass(frozen=True)
class Ceilings:
    """``matmul``: FLOP/s by shape; ``memory``: bytes/s by kind of traffic, reads and writes added up. ``published``:
    the FLOP/s that MFU is to be counted by in place of those that were measured, where somebody said so."""

    precision: str
    matmul: dict[str, float]
    memory: dict[str, float]
    published: float | None = None

    @property
    def flops(self) -> float:
        return max(self.matmul.values())

    @property
    def bandwidth(self) -> float:
        return max(self.memory.values())


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
    from llmc_cli.benchmark.workloads import fill

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
    _release(kernels)
    return found


def _release(kernels: Kernels) -> None:
    """Let others have the memory of a GPU that measuring took."""
    device = getattr(kernels, "device", None)
    if device is not None:
        device.release()


def memory_bandwidth(kernels: Kernels, threads: int, elements: int = BANDWIDTH_ELEMENTS) -> dict[str, float]:
    """Bytes/s of three kinds of traffic over arrays of ``elements`` random numbers.

    read: our sum of squares; copy: NumPy, a piece of the array on each thread, or on a GPU its own way of copying;
    update: our AdamW, which reads four arrays and writes three.
    """
    from llmc_cli.benchmark.workloads import adamw_arguments

    master, m, v, g, *rest = adamw_arguments(kernels, elements)
    out, size, repeats = kernels.alloc((1,), np.float64), g.nbytes, CEILING_REPEATS
    found = {"read": size / best_time(kernels, lambda: kernels.sum_squares(out, g), repeats)}
    found["copy"] = 2 * size / _copy_time(kernels, m, g, threads)
    found["update"] = 7 * size / best_time(kernels, lambda: kernels.adamw(master, m, v, g, *rest), repeats)
    return found


def _copy_time(kernels: Kernels, target: Array, source: Array, threads: int) -> float:
    if not isinstance(source, np.ndarray):
        return best_time(kernels, lambda: kernels.copy(target, source), CEILING_REPEATS)
    with ThreadPoolExecutor(threads) as pool:  # NumPy copies without holding the interpreter's lock
        pieces = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
        return best_time(kernels, lambda: list(pool.map(_copy, pieces)), CEILING_REPEATS)


def _copy(pair: tuple[NDArray[np.floating], NDArray[np.floating]]) -> None:
    np.copyto(*pair)


def measure_ceilings(backend: Backend) -> Ceilings:
    """Both kinds of ceilings; takes a few seconds, and four arrays' worth of memory for a moment."""
    kernels, shapes, elements = backend.kernels, SHAPES, BANDWIDTH_ELEMENTS
    if backend.device != "cpu":
        shapes, elements = CUDA_SHAPES, min(CUDA_ELEMENTS, (backend.memory or 0) // CUDA_MEMORY)
    matmul = {" x ".join(map(str, shape)): matmul_flops(kernels, *shape, CEILING_REPEATS) for shape in shapes}
    memory = memory_bandwidth(kernels, backend.threads, elements)
    _release(kernels)
    return Ceilings(backend.precision, matmul, memory)
