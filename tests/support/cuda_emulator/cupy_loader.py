"""Load the fake CuPy of this folder in a test process. Subprocesses put the folder on PYTHONPATH instead."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def load():
    """Return the fake CuPy module without changing what ``import cupy`` finds."""

    def remove_cupy():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "cupy"}

    before = remove_cupy()
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("cupy")
    finally:
        sys.path.remove(str(FOLDER))
        remove_cupy()
        sys.modules.update(before)
