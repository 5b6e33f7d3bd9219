"""Puts the CuPy of this folder in the place of the real one, within a test process.

A subprocess needs no such call: there the folder is put on PYTHONPATH.
"""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def install():
    """The stand-in, from now on ``cupy`` to everyone who imports it."""
    loaded = sys.modules.get("cupy")
    if loaded is not None and Path(loaded.__file__).parent != FOLDER / "cupy":
        raise RuntimeError(f"the real CuPy is loaded already, from {loaded.__file__}")
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module("cupy")
