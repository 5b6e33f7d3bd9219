"""Measure the machine's peak FLOP/s and memory bandwidth, which benchmark results are relative to."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.backend import Backend
from llmc_cli.kernels.operations import adamw_use
from llmc_cli.kernels.peak import best_time, matmul_flops
from llmc_cli.kernels.random_arrays import random_arguments
from llmc_cli.kernels.spec import Array, Kernels

CEILING_REPEATS = 10  # more than usual: every share depends on these, and the machine may be busy

SHAPES = ((1536, 1536, 1536), (2048, 2048, 2048), (1024, 3072, 768), (256, 12288, 768))  # N, O, I
BANDWIDTH_ELEMENTS = 1 << 25  # per array, far larger than the caches

# on GPUs, where the sizes above would measure launch overhead
CUDA_SHAPES = ((8192, 8192, 8192), (4096, 4096, 4096), (16384, 3072, 768), (4096, 50304, 768))
CUDA_ELEMENTS = 1 << 28
CUDA_BYTES_PER_ELEMENT = 32  # of free memory; the four float32 arrays take half of it


@dataclass(frozen=True)
class Ceilings:
    """The measured peaks.

    ``matmul``: FLOP/s by shape. ``memory``: bytes/s by kind of traffic, reads plus writes. ``published``: the FLOP/s
    given by the user as the basis of MFU instead of the measured ones.
    """

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
    """Return bytes/s for three kinds of traffic over float32 arrays of ``elements`` random numbers.

    read: ``sum_squares``. copy: ``numpy.copyto`` on slices of the array in parallel, or the GPU's copy. update:
    ``adamw``, which reads four arrays and writes three.
    """
    master, m, v, g, *rest = random_arguments(kernels, "adamw", adamw_use(elements))
    out, size, repeats = kernels.alloc((1,), np.float64), g.nbytes, CEILING_REPEATS
    return {
        "read": size / best_time(kernels, lambda: kernels.sum_squares(out, g), repeats),
        "copy": 2 * size / _copy_time(kernels, m, g, threads),
        "update": 7 * size / best_time(kernels, lambda: kernels.adamw(master, m, v, g, *rest), repeats),
    }


def _copy_time(kernels: Kernels, target: Array, source: Array, threads: int) -> float:
    if not isinstance(source, np.ndarray):
        return best_time(kernels, lambda: kernels.copy(target, source), CEILING_REPEATS)
    with ThreadPoolExecutor(threads) as pool:  # NumPy releases the GIL while it copies
        slices = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
        return best_time(kernels, lambda: list(pool.map(_copy, slices)), CEILING_REPEATS)


def _copy(pair: tuple[NDArray[np.floating], NDArray[np.floating]]) -> None:
    np.copyto(*pair)


def measure_ceilings(backend: Backend) -> Ceilings:
    """Measure both kinds of ceilings. Takes a few seconds and temporarily the memory of four arrays."""
    kernels, shapes, elements = backend.kernels, SHAPES, BANDWIDTH_ELEMENTS
    if backend.device != "cpu":
        shapes, elements = CUDA_SHAPES, min(CUDA_ELEMENTS, (backend.memory or 0) // CUDA_BYTES_PER_ELEMENT)
    matmul = {" x ".join(map(str, shape)): matmul_flops(kernels, *shape, CEILING_REPEATS) for shape in shapes}
    memory = memory_bandwidth(kernels, backend.threads, elements)
    kernels.release_memory()
    return Ceilings(backend.precision, matmul, memory)
