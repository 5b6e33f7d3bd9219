"""The choice between AMX tiles and BLAS for float32 products: measured once and stored beside the compiled kernels, so
that a resumed run multiplies as the original run did."""

import contextlib
import os
import time

import numpy as np

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.kernels.cpu import compile_cache
from llmc_cli.kernels.cpu.matmul import BlasMatmul, Matmul

SHAPE = (1024, 768, 768)  # M, N, K
REPETITIONS = 15
BUSY_LOAD = 0.5  # load average of the last minute


def speedup_over_blas(matmul: Matmul, threads: int) -> float | None:
    """Return the speed of ``matmul`` divided by that of BLAS, for the current number of threads.

    Return None if it has not been measured yet and the machine is too busy to measure it now.
    """
    name = f"float32-speedup-{threads}"
    with contextlib.suppress(OSError, ValueError):
        return float((compile_cache.kernel_folder() / name).read_text())
    if is_busy():
        return None
    measured = measure_speedup(matmul)
    with contextlib.suppress(OSError), atomic_write(compile_cache.kernel_folder() / name) as file:
        file.write(f"{measured:.2f}\n".encode())
    return measured


def is_busy() -> bool:
    """Whether other processes use the machine; always False on Windows, which has no load average."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] >= BUSY_LOAD


def measure_speedup(matmul: Matmul) -> float:
    """Return the best time of BLAS divided by the best time of ``matmul``, from alternating runs."""
    M, N, K = SHAPE
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((M, K), np.float32), generator.standard_normal((N, K), np.float32)
    c = np.empty((M, N), np.float32)
    contenders: tuple[Matmul, Matmul] = BlasMatmul(), matmul
    best = [np.inf, np.inf]
    for _ in range(REPETITIONS + 1):  # the first one is a warm-up; it is never the fastest
        for i, multiply in enumerate(contenders):
            start = time.perf_counter()
            multiply(c, a, b, transpose_b=True)
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] / best[1]
