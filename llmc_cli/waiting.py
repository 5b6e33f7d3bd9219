"""How idle threads wait, which the libraries that have them read from the environment when they load."""

import os

PASSIVE = {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
"""BLAS and numba take turns; a pool that spins while the other works costs half the machine."""

_set_here: set[str] = set()


def wait_passively() -> None:
    """Set these variables for this process and its children, where the user has not; before NumPy is imported."""
    for name, value in PASSIVE.items():
        if name not in os.environ:
            os.environ[name] = value
            _set_here.add(name)


def users_environment() -> dict[str, str]:
    """The environment as the user gave it, for the processes of others."""
    return {name: value for name, value in os.environ.items() if name not in _set_here}
