import os
import platform
import subprocess
import sys

import pytest

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.kernels import backend as backend_module
from llmc_cli.kernels.backend import open_kernels
from llmc_cli.kernels.cpu import compile_cache, loading
from llmc_cli.kernels.cpu.amx import intrinsics
from llmc_cli.machine import cores


def test_cpu_backend_describes_itself(no_cupy):
    backend = open_kernels("auto", "auto", 1)
    assert (backend.device, backend.precision, backend.threads) == ("cpu", "fp32", 1)
    assert backend.kernels.name == "cpu"
    assert "1 thread" in backend.description
    assert "cpu" in backend.reason
    assert "fp32" in backend.reason
    assert open_kernels("cpu", "fp32", None).reason == ""
    assert open_kernels("cpu", "fp32", None).threads == cores.default_threads()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("gpu", "auto", None), UsageError, "--device gpu"),
        (("cuda:x", "auto", None), UsageError, "--device cuda:x"),
        (("cpu", "fp16", None), UsageError, "--precision fp16"),
        (("cpu", "auto", 0), UsageError, "--threads 0"),
        (("cuda", "auto", None), MissingError, "CuPy is not installed"),
        (("cuda:1", "auto", None), MissingError, "CuPy is not installed"),
        (("auto", "tf32", None), MissingError, "--precision tf32: supported on GPUs only"),
    ],
)
def test_unknown_and_unavailable_options_are_errors(no_cupy, args, error, message):
    with pytest.raises(error, match=message):
        open_kernels(*args)


TILES = [False, pytest.param(True, marks=pytest.mark.skipif(not intrinsics.available(), reason="needs AMX tiles"))]


@pytest.mark.parametrize("tiles", TILES)
def test_precision_and_environment_select_the_matmul(monkeypatch, tiles):
    monkeypatch.setenv("LLMC_MATMUL", "tiles" if tiles else "blas")
    for precision, product in (
        ("fp32", "six bf16 products on AMX tiles" if tiles else "openblas"),
        ("bf16", "bf16 on AMX tiles" if tiles else "bf16 operands, float32 products by openblas"),
    ):
        backend = open_kernels("cpu", precision, 1)
        assert backend.precision == precision
        assert product in backend.description
    training = open_kernels("cpu", "auto", 1, training=True)
    assert training.precision == ("bf16" if tiles else "fp32")
    assert f"{training.precision}: bf16 is {'' if tiles else 'not '}multiplied natively here" in training.reason
    assert open_kernels("cpu", "auto", 1).precision == "fp32"
    if tiles:
        assert "three bf16 products on AMX tiles" in open_kernels("cpu", "bf16x3", 1).description
    else:
        with pytest.raises(MissingError, match="bf16x3: requires AMX tiles"):
            open_kernels("cpu", "bf16x3", 1)


@pytest.mark.skipif(not intrinsics.available(), reason="needs AMX tiles")
@pytest.mark.parametrize(("speedup", "matmul"), [(1.5, "six bf16 products"), (0.9, "openblas")])
def test_fp32_uses_the_faster_matmul(monkeypatch, speedup, matmul):
    monkeypatch.delenv("LLMC_MATMUL", raising=False)
    loading.load(loading.KERNELS)
    from llmc_cli.kernels.cpu import matmul_choice

    monkeypatch.setattr(matmul_choice, "speedup_over_blas", lambda matmul, threads: speedup)
    backend = open_kernels("cpu", "fp32", 1)
    assert backend.kernels.matmul.name.startswith(matmul)
    assert f"six bf16 products on AMX tiles measured {speedup:.2f} times as fast as BLAS" in backend.description


@pytest.mark.parametrize("writable", [True, False])
def test_matmul_speedup_is_measured_once(monkeypatch, tmp_path, writable):
    loading.load(loading.KERNELS)
    from llmc_cli.kernels.cpu import matmul_choice
    from llmc_cli.kernels.cpu.matmul import BlasMatmul

    folder = tmp_path / "kernels"
    if not writable:
        folder.write_text("a file, not a folder")
    monkeypatch.setattr(compile_cache, "kernel_folder", lambda: folder)
    monkeypatch.setattr(matmul_choice, "is_busy", lambda: True)
    assert matmul_choice.speedup_over_blas(BlasMatmul(), 1) is None
    monkeypatch.setattr(matmul_choice, "is_busy", lambda: False)
    speedup = matmul_choice.speedup_over_blas(BlasMatmul(), 1)
    assert 0.05 < speedup < 20.0  # BLAS against itself, on a busy machine
    if writable:
        monkeypatch.setattr(matmul_choice, "measure_speedup", lambda matmul: pytest.fail("measured again"))
        assert matmul_choice.speedup_over_blas(BlasMatmul(), 1) == pytest.approx(speedup, abs=0.006)
    else:
        monkeypatch.setattr(matmul_choice, "measure_speedup", lambda matmul: 7.0)
        assert matmul_choice.speedup_over_blas(BlasMatmul(), 1) == 7.0


def test_invalid_or_unavailable_matmul_is_an_error(monkeypatch):
    monkeypatch.setenv("LLMC_MATMUL", "mkl")
    with pytest.raises(UsageError, match="LLMC_MATMUL=mkl: expected one of auto, tiles, blas"):
        open_kernels("cpu", "fp32", 1)
    monkeypatch.setenv("LLMC_MATMUL", "tiles")
    monkeypatch.setattr(backend_module, "_has_tiles", lambda: False)
    with pytest.raises(MissingError, match="LLMC_MATMUL=tiles: this processor has no AMX tiles"):
        open_kernels("cpu", "fp32", 1)


def test_more_threads_than_the_limit_of_numba_is_an_error():
    open_kernels("cpu", "fp32", 1)
    with pytest.raises(MissingError, match="NUMBA_NUM_THREADS=100000"):
        open_kernels("cpu", "fp32", 100_000)


PROGRAM = """
import os, sys
import llmc_cli.kernels.backend
import llmc_cli.machine.cores
assert not {"numpy", "numba", "scipy"} & set(sys.modules)
before = dict(os.environ)
threads = llmc_cli.machine.cores.available_cores() + MORE
backend = llmc_cli.kernels.backend.open_kernels("cpu", "fp32", threads)
assert backend.threads == backend.kernels.threads == threads
assert dict(os.environ) == before | ({"NUMBA_NUM_THREADS": str(threads)} if MORE else {})
import numba
assert numba.config.CACHE_DIR == ""
assert numba.get_num_threads() == threads
"""


@pytest.mark.parametrize("more", [0, 3])
def test_import_and_open_have_no_side_effects(tmp_path, monkeypatch, more):
    """Importing loads no heavy package. Opening changes neither numba's settings nor the environment, except
    NUMBA_NUM_THREADS for more threads than cores."""
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    subprocess.run([sys.executable, "-c", PROGRAM.replace("MORE", str(more))], check=True, cwd=tmp_path)


def test_default_threads_respect_numba_num_threads(tmp_path):
    program = "from llmc_cli.kernels.backend import open_kernels; print(open_kernels('cpu', 'fp32', None).threads)"
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.stdout == "1\n", run.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
def test_tiles_are_unavailable_if_numba_targets_another_processor():
    """LLVM aborts the process on instructions that the target does not have."""
    settings = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}
    program = "from llmc_cli.kernels.cpu.amx import intrinsics; print(intrinsics.available())"
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"
