"""How idle threads of BLAS and numba wait. The libraries read these environment variables when they are loaded."""

import os

PASSIVE_WAIT = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
"""BLAS and numba alternate, so a thread pool that spins while idle takes up to half of the cores from the other."""

SPIN_WAIT = {"GOMP_SPINCOUNT": "2000"}
"""Iterations that idle numba threads spin before they sleep: about 0.1 ms."""

_set_here: set[str] = set()


def set_passive_wait() -> None:
    """Make idle threads sleep, in this process and its children. Call before NumPy is imported.

    Variables that the user has set are left alone.
    """
    _set(PASSIVE_WAIT)


def set_spin_wait() -> None:
    """Make idle numba threads spin briefly before they sleep. Call before numba is imported.

    For many short numba calls, as in sampling, where waking a thread takes longer than a call. Variables that the user
    has set are left alone.
    """
    _set(SPIN_WAIT)


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        if name not in os.environ:
            os.environ[name] = value
            _set_here.add(name)


def user_environment() -> dict[str, str]:
    """Return the environment without the variables set by this module."""
    return {name: value for name, value in os.environ.items() if name not in _set_here}
