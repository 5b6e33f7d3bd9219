"""What this machine can do at best, measured: the figures that speeds are shares of."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.backend import Backend
from llmc_cli.kernels.operations import adamw_use
from llmc_cli.kernels.peak import best_time, matmul_flops
from llmc_cli.kernels.random_arrays import random_arguments
from llmc_cli.kernels.spec import Array, Kernels

CEILING_REPEATS = 10  # for what everything is a share of, also on a busy machine

SHAPES = ((1536, 1536, 1536), (2048, 2048, 2048), (1024, 3072, 768), (256, 12288, 768))  # N, O, I
BANDWIDTH_ELEMENTS = 1 << 25  # of each array: far more than caches hold

# of a GPU, on which the same would be over before it has well begun
CUDA_SHAPES = ((8192, 8192, 8192), (4096, 4096, 4096), (16384, 3072, 768), (4096, 50304, 768))
CUDA_ELEMENTS = 1 << 28
CUDA_MEMORY = 32  # bytes that must be free for each of these, or there are fewer: four arrays are half of that


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


def memory_bandwidth(kernels: Kernels, threads: int, elements: int = BANDWIDTH_ELEMENTS) -> dict[str, float]:
    """Bytes/s of three kinds of traffic over arrays of ``elements`` random numbers.

    read: our sum of squares; copy: NumPy, a piece of the array on each thread, or on a GPU its own way of copying;
    update: our AdamW, which reads four arrays and writes three.
    """
    master, m, v, g, *rest = random_arguments(kernels, "adamw", adamw_use(elements))
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
    kernels.release_memory()
    return Ceilings(backend.precision, matmul, memory)
