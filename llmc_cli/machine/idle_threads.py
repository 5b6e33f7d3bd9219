"""How idle threads wait, which the libraries that have them read from the environment when they load."""

import os

PASSIVE = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
"""BLAS and numba take turns; a pool that spins while the other works costs half the machine."""

SPINS = {"GOMP_SPINCOUNT": "2000"}
"""Turns that idle threads of numba's spin before they sleep: a tenth of a millisecond."""

_set_here: set[str] = set()


def wait_passively() -> None:
    """Set these variables for this process and its children, where the user has not; before NumPy is imported."""
    _set(PASSIVE)


def spin_between_calls() -> None:
    """For work of many short calls of numba's alone, as sampling is, where waking a thread takes longer than a call;
    before numba is imported."""
    _set(SPINS)


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        if name not in os.environ:
            os.environ[name] = value
            _set_here.add(name)


def users_environment() -> dict[str, str]:
    """The environment as the user gave it, for the processes of others."""
    return {name: value for name, value in os.environ.items() if name not in _set_here}
