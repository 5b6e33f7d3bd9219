"""Loads the CuPy of this folder within a test process.

A subprocess needs no such call: there the folder is put on PYTHONPATH.
"""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def load():
    """The stand-in. Nothing but the caller knows of it: to ``import cupy`` there is as much CuPy as before."""

    def taken():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "cupy"}

    before = taken()
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("cupy")
    finally:
        sys.path.remove(str(FOLDER))
        taken()
        sys.modules.update(before)
