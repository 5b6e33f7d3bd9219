"""Which way to multiply float32 is the faster one here, measured once and remembered beside the compiled kernels: a run
and the one that resumes it must not multiply differently."""

import contextlib
import os
import time

import numpy as np

from llmc_cli.formats.atomic import atomic_write
from llmc_cli.kernels.cpu import compile_cache
from llmc_cli.kernels.cpu.matmul import BlasMatmul, Matmul

SHAPE = (1024, 768, 768)  # M, N, K
TURNS = 15
BUSY = 0.5  # processes that run or want to


def gain(matmul: Matmul, threads: int) -> float | None:
    """How many times as fast as BLAS ``matmul`` is with this many threads, which numba and BLAS are set to. None where
    that is not known, and the machine too busy to tell: a wrong figure would be kept."""
    name = f"float32-gain-{threads}"
    with contextlib.suppress(OSError, ValueError):
        return float((compile_cache.kernel_folder() / name).read_text())
    if is_busy():
        return None
    measured = measure(matmul)
    with contextlib.suppress(OSError), atomic_write(compile_cache.kernel_folder() / name) as file:
        file.write(f"{measured:.2f}\n".encode())
    return measured


def is_busy() -> bool:
    """Whether half a core or more has been at work during the last minute; not known on Windows."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] >= BUSY


def measure(matmul: Matmul) -> float:
    """The best of some turns of each, taken alternately."""
    M, N, K = SHAPE
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((M, K), np.float32), generator.standard_normal((N, K), np.float32)
    c = np.empty((M, N), np.float32)
    sides: tuple[Matmul, Matmul] = BlasMatmul(), matmul
    best = [np.inf, np.inf]
    for _ in range(TURNS + 1):  # the first one warms up, and may be as slow as it likes
        for side, multiply in enumerate(sides):
            start = time.perf_counter()
            multiply(c, a, b, False, True, False, None)
            best[side] = min(best[side], time.perf_counter() - start)
    return best[0] / best[1]
