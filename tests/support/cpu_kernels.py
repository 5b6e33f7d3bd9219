"""The state of ``CpuKernels`` that tests change or check."""

import contextlib

import numpy as np


@contextlib.contextmanager
def thread_limit(kernels, threads):
    """Run on this many threads inside the block."""
    previous = kernels.threads
    kernels.set_threads(threads)
    try:
        yield
    finally:
        kernels.set_threads(previous)


def scratch_bytes(*owners):
    """Return the bytes of all scratch arrays of these objects: kernels, or what multiplies their matrices."""
    return sum(array.nbytes for owner in owners for array in _arrays(vars(owner)))


def _arrays(value):
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _arrays(each)
