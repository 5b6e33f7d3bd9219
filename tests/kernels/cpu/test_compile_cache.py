"""The cache of compiled kernels in subprocesses: warm, cold, unusable, and used by several at once.

The subprocesses really compile, but use a copy of the package with one kernel, which takes a second.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

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

    def __init__(self, threads, matmul, attention, on_compile):
        numba.set_num_threads(threads)
        self.matmul = BlasMatmul()

    def embedding_forward(self, x, wte, wpe, ids, positions):
        embedding.embedding_forward(x, wte, wpe, ids, positions)
"""

PROGRAM = """
import numpy as np
from llmc_cli.kernels.backend import open_kernels
messages = []
kernels = open_kernels("cpu", "fp32", 1, messages.append).kernels
assert kernels.name == "small"
x = np.full((2, 3), np.nan, np.float32)
one = np.ones((4, 3), np.float32)
kernels.embedding_forward(x, one, one, np.array([0, 3], np.int32), np.array([1, 2], np.int32))
assert (x == 2.0).all()
import numba
assert numba.config.CACHE_DIR == ""
print(messages)
"""


@pytest.fixture
def package(tmp_path):
    """A copy of the package whose CPU backend has one kernel."""
    source, copy = Path(compile_cache.__file__).parents[2], tmp_path / "site" / "llmc_cli"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, copy, ignore=ignore)
    if not (copy / "formats").exists():  # in an editable install it is outside the package
        shutil.copytree(source.parent / "formats", copy / "formats", ignore=ignore)
    (copy / "kernels" / "cpu" / "kernels.py").write_text(SMALL_KERNELS)
    return copy


@pytest.fixture
def start(package, tmp_path):
    """Start a process that opens the kernels with the cache folder ``tmp_path/cache``; see ``compile_messages``."""

    def start(**environment):
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_", "LLMC_"))
        }
        return subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(package.parent)!r})\n{PROGRAM}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=inherited | {"LLMC_CACHE": str(tmp_path / "cache"), "LLMC_MATMUL": "blas"} | environment,
        )

    return start


def compile_messages(process):
    """Wait for a process of ``start``; return the messages of its ``on_compile``."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert err == ""
    return out.strip()


COMPILING = "['compiling kernels (first use only, about 10 s)']"


def test_cold_then_warm_then_edited(start, package, tmp_path):
    assert compile_messages(start()) == COMPILING
    (folder,) = [path for path in (tmp_path / "cache" / "kernels").iterdir() if path.is_dir()]
    assert (folder / "complete").exists()
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert len(files) > 2
    assert compile_messages(start()) == "[]"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
    # any source in the folder counts, not only the kernel's
    compiling = package / "kernels" / "cpu" / "compiling.py"
    compiling.write_text(compiling.read_text() + "\n")
    assert compile_messages(start()) == COMPILING
    assert not list(package.rglob("*.nbi"))  # numba's own cache


def test_concurrent_cold_starts(start):
    processes = [start() for _ in range(3)]
    assert all(compile_messages(process) in (COMPILING, "[]") for process in processes)
    assert compile_messages(start()) == "[]"


def test_killed_process_leaves_cache_cold_and_unlocked(start, tmp_path):
    process = start()
    folder = tmp_path / "cache" / "kernels"
    while process.poll() is None and not list(folder.glob("*.lock")):
        pass
    process.kill()
    process.communicate()
    assert compile_messages(start()) == COMPILING
    assert compile_messages(start()) == "[]"


def test_cache_path_is_a_file(start, tmp_path):
    """As on a read-only disk, the kernels are compiled for this process only."""
    (tmp_path / "cache").write_text("a file")
    assert compile_messages(start()) == COMPILING
    assert (tmp_path / "cache").read_text() == "a file"


def test_full_disk(package, start, tmp_path):
    module = package / "kernels" / "cpu" / "compile_cache.py"
    module.write_text(module.read_text().replace("REQUIRED_SPACE = 32 << 20", "REQUIRED_SPACE = 1 << 80"))
    assert compile_messages(start()) == COMPILING
    assert not list((tmp_path / "cache").rglob("*.nbi"))


def test_complete_cache_that_numba_cannot_write(package, start, tmp_path):
    """The marker exists and the folder seems writable, but numba cannot create its subfolder."""
    assert compile_messages(start()) == COMPILING
    folder = next(path for path in (tmp_path / "cache" / "kernels").iterdir() if path.is_dir())
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("not a folder")
    assert compile_messages(start()) == "[]"
    assert not list(package.rglob("*.nbi"))  # numba's own cache


def test_cache_path_cannot_be_read(start, tmp_path):
    """Like another user's home folder; here the name is too long."""
    assert compile_messages(start(LLMC_CACHE=str(tmp_path / ("x" * 300)))) == COMPILING


def test_file_system_without_locks(package, start, tmp_path):
    module = package / "kernels" / "cpu" / "compile_cache.py"
    module.write_text(
        module.read_text()
        + """
def _unsupported(path):
    raise NotImplementedError("FileSystem does not appear to support flock")

filelock.FileLock = _unsupported
"""
    )
    assert compile_messages(start()) == COMPILING


def test_without_a_home_folder(package, start, tmp_path):
    module = package / "machine" / "cache_folder.py"
    module.write_text(
        module.read_text()
        + """
def _no_home():
    raise RuntimeError("Could not determine home directory.")

Path.home = _no_home
"""
    )
    assert compile_messages(start(LLMC_CACHE="")) == COMPILING


def test_old_versions_are_removed(tmp_path):
    for n in range(8):
        folder = tmp_path / f"v{n}"
        folder.mkdir()
        (tmp_path / f"v{n}.lock").touch()
        os.utime(folder, (1000 + n, 1000 + n))
    compile_cache._remove_old_versions(tmp_path / "v0")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["v0", "v5", "v6", "v7"]
    assert {path.stem for path in tmp_path.glob("*.lock")} == {"v0", "v5", "v6", "v7"}


def test_loaded_kernels_do_not_compile_again():
    open_kernels("cpu", "fp32", 1)
    messages = []
    open_kernels("cpu", "fp32", 1, messages.append)
    assert messages == []
