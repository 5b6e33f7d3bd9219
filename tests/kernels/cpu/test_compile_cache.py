"""The cache of compiled kernels, in processes of their own: warm, cold, read-only, several at once.

A cold start compiles for real; so that it takes a second, the package is copied with fewer kernels.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmc_cli.kernels.backend import open_kernels
from llmc_cli.kernels.cpu import compile_cache

SMALL_KERNELS = """
import numba
import numpy as np
from llmc_cli.kernels.cpu import embedding
from llmc_cli.kernels.cpu.matmul import BlasMatmul

class CpuKernels:
    name = "small"

    def __init__(self, threads, matmul, attend, on_compile):
        numba.set_num_threads(threads)
        self.matmul = BlasMatmul()

    def embedding_forward(self, x, wte, wpe, ids, positions):
        embedding.embedding_forward(x, wte, wpe, ids, positions)
"""

PROGRAM = """
import numpy as np
from llmc_cli.kernels.backend import open_kernels
told = []
kernels = open_kernels("cpu", "fp32", 1, told.append).kernels
assert kernels.name == "small"
x = np.full((2, 3), np.nan, np.float32)
one = np.ones((4, 3), np.float32)
kernels.embedding_forward(x, one, one, np.array([0, 3], np.int32), np.array([1, 2], np.int32))
assert (x == 2.0).all()
import numba
assert numba.config.CACHE_DIR == ""
print(told)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package whose CPU backend has one kernel."""
    source, copy = Path(compile_cache.__file__).parents[2], tmp_path / "site" / "llmc_cli"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, copy, ignore=ignore)
    if not (copy / "formats").exists():  # an editable install: these folders lie elsewhere
        shutil.copytree(source.parent / "formats", copy / "formats", ignore=ignore)
    (copy / "kernels" / "cpu" / "kernels.py").write_text(SMALL_KERNELS)
    return copy


@pytest.fixture
def start(package, tmp_path):
    """Start a process that opens the kernels with its cache at ``tmp_path/cache``; ``told(process)`` ends it."""

    def start(**environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_", "LLMC_"))}
        return subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{PROGRAM}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=kept | {"LLMC_CACHE": str(tmp_path / "cache"), "LLMC_MATMUL": "blas"} | environment,
        )

    return start


def told(process):
    """What a process's ``on_compile`` was told."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    return out.strip()


COMPILING = "['compiling kernels, once, about 10 s']"


def test_cold_then_warm_then_edited(start, package, tmp_path):
    assert told(start()) == COMPILING
    (folder,) = [path for path in (tmp_path / "cache" / "kernels").iterdir() if path.is_dir()]
    assert (folder / "complete").exists()
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert len(files) > 2
    assert told(start()) == "[]"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
    # any source of the folder counts, not only the one with the kernel
    compiling = package / "kernels" / "cpu" / "compiling.py"
    compiling.write_text(compiling.read_text() + "\n")
    assert told(start()) == COMPILING
    assert not list(package.rglob("*.nbi"))  # numba's own place


def test_several_processes_at_once(start, tmp_path):
    processes = [start() for _ in range(3)]
    assert all(told(process) in (COMPILING, "[]") for process in processes)
    assert told(start()) == "[]"


def test_killed_while_compiling(start, tmp_path):
    """An incomplete folder counts as cold; its lock goes with the process that held it."""
    process = start()
    folder = tmp_path / "cache" / "kernels"
    while process.poll() is None and not list(folder.glob("*.lock")):
        pass
    process.kill()
    process.communicate()
    assert told(start()) == COMPILING
    assert told(start()) == "[]"


def test_a_place_that_cannot_be_a_folder(start, tmp_path):
    """As with a read-only disk: compiled for this process only."""
    (tmp_path / "cache").write_text("a file")
    assert told(start()) == COMPILING
    assert (tmp_path / "cache").read_text() == "a file"


def test_full_disk(package, start, tmp_path):
    module = package / "kernels" / "cpu" / "compile_cache.py"
    module.write_text(module.read_text().replace("SPACE = 32 << 20", "SPACE = 1 << 80"))
    assert told(start()) == COMPILING
    assert not list((tmp_path / "cache").rglob("*.nbi"))


def test_numba_refuses_the_folder(package, start, tmp_path):
    """The marker stands and the folder seems writable, but numba finds that it is not."""
    assert told(start()) == COMPILING
    folder = next(path for path in (tmp_path / "cache" / "kernels").iterdir() if path.is_dir())
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("in the way")
    assert told(start()) == "[]"


def test_a_place_that_cannot_be_looked_into(start, tmp_path):
    """Such as the home folder of another user: here it is a name that is too long."""
    assert told(start(LLMC_CACHE=str(tmp_path / ("x" * 300)))) == COMPILING


def test_a_file_system_without_locks(package, start, tmp_path):
    module = package / "kernels" / "cpu" / "compile_cache.py"
    module.write_text(
        module.read_text()
        + """
def _without(path):
    raise NotImplementedError("FileSystem does not appear to support flock")

filelock.FileLock = _without
"""
    )
    assert told(start()) == COMPILING


def test_without_a_home_folder(package, start, tmp_path):
    module = package / "downloads.py"
    module.write_text(
        module.read_text()
        + """
def _homeless():
    raise RuntimeError("Could not determine home directory.")

Path.home = _homeless
"""
    )
    assert told(start(LLMC_CACHE="")) == COMPILING


def test_old_versions_go(tmp_path):
    for n in range(8):
        folder = tmp_path / f"v{n}"
        folder.mkdir()
        (tmp_path / f"v{n}.lock").touch()
        os.utime(folder, (1000 + n, 1000 + n))
    compile_cache._remove_old_versions(tmp_path / "v0")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["v0", "v5", "v6", "v7"]
    assert {path.stem for path in tmp_path.glob("*.lock")} == {"v0", "v5", "v6", "v7"}


def test_loaded_kernels_are_warm():
    kernels = open_kernels("cpu", "fp32", 1).kernels
    assert compile_cache.is_warm()
    assert kernels.dtype == np.float32
