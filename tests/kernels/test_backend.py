import os
import platform
import subprocess
import sys

import pytest

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.kernels import backend as device
from llmc_cli.kernels.cpu import compile_cache, loading
from llmc_cli.kernels.cpu.amx import intrinsics
from llmc_cli.machine import cores


def test_cpu_backend_says_what_it_is(no_cupy):
    backend = device.open_kernels("auto", "auto", 1)
    assert (backend.device, backend.precision, backend.threads) == ("cpu", "fp32", 1)
    assert backend.kernels.name == "cpu"
    assert "1 thread" in backend.description
    assert "cpu" in backend.reason
    assert "fp32" in backend.reason
    assert device.open_kernels("cpu", "fp32", None).reason == ""
    assert device.open_kernels("cpu", "fp32", None).threads == cores.default_threads()


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
def test_what_cannot_be_had_is_an_error(no_cupy, args, error, message):
    with pytest.raises(error, match=message):
        device.open_kernels(*args)


TILES = [False, pytest.param(True, marks=pytest.mark.skipif(not intrinsics.available(), reason="needs AMX tiles"))]


@pytest.mark.parametrize("tiles", TILES)
def test_what_multiplies(monkeypatch, tiles):
    monkeypatch.setenv("LLMC_MATMUL", "tiles" if tiles else "blas")
    for precision, product in (
        ("fp32", "six bf16 products on AMX tiles" if tiles else "openblas"),
        ("bf16", "bf16 on AMX tiles" if tiles else "bf16 operands, float32 products by openblas"),
    ):
        backend = device.open_kernels("cpu", precision, 1)
        assert backend.precision == precision
        assert product in backend.description
    training = device.open_kernels("cpu", "auto", 1, training=True)
    assert training.precision == ("bf16" if tiles else "fp32")
    assert f"{training.precision}: bf16 is {'' if tiles else 'not '}multiplied natively here" in training.reason
    assert device.open_kernels("cpu", "auto", 1).precision == "fp32"
    if tiles:
        assert "three bf16 products on AMX tiles" in device.open_kernels("cpu", "bf16x3", 1).description
    else:
        with pytest.raises(MissingError, match="bf16x3: requires AMX tiles"):
            device.open_kernels("cpu", "bf16x3", 1)


@pytest.mark.skipif(not intrinsics.available(), reason="needs AMX tiles")
@pytest.mark.parametrize(("gained", "product"), [(1.5, "six bf16 products"), (0.9, "openblas")])
def test_float32_takes_what_is_faster(monkeypatch, gained, product):
    monkeypatch.delenv("LLMC_MATMUL", raising=False)
    loading.load(loading.KERNELS)
    from llmc_cli.kernels.cpu import matmul_choice

    monkeypatch.setattr(matmul_choice, "speedup_over_blas", lambda matmul, threads: gained)
    backend = device.open_kernels("cpu", "fp32", 1)
    assert backend.kernels.matmul.name.startswith(product)
    assert f"six bf16 products on AMX tiles measured {gained:.2f} times as fast as BLAS" in backend.description


@pytest.mark.parametrize("writable", [True, False])
def test_what_is_faster_is_measured_once(monkeypatch, tmp_path, writable):
    loading.load(loading.KERNELS)
    from llmc_cli.kernels.cpu import matmul_choice
    from llmc_cli.kernels.cpu.matmul import BlasMatmul

    folder = tmp_path / "kernels"
    if not writable:
        folder.write_text("a file, so no folder")
    monkeypatch.setattr(compile_cache, "kernel_folder", lambda: folder)
    monkeypatch.setattr(matmul_choice, "is_busy", lambda: True)
    assert matmul_choice.speedup_over_blas(BlasMatmul(), 1) is None
    monkeypatch.setattr(matmul_choice, "is_busy", lambda: False)
    found = matmul_choice.speedup_over_blas(BlasMatmul(), 1)
    assert 0.05 < found < 20.0  # itself, on a busy machine
    if writable:
        monkeypatch.setattr(matmul_choice, "measure_speedup", lambda matmul: pytest.fail("measured again"))
        assert matmul_choice.speedup_over_blas(BlasMatmul(), 1) == pytest.approx(found, abs=0.006)
    else:
        monkeypatch.setattr(matmul_choice, "measure_speedup", lambda matmul: 7.0)
        assert matmul_choice.speedup_over_blas(BlasMatmul(), 1) == 7.0


def test_what_cannot_multiply(monkeypatch):
    monkeypatch.setenv("LLMC_MATMUL", "abacus")
    with pytest.raises(UsageError, match="LLMC_MATMUL=abacus: expected one of auto, tiles, blas"):
        device.open_kernels("cpu", "fp32", 1)
    monkeypatch.setenv("LLMC_MATMUL", "tiles")
    monkeypatch.setattr(device, "_has_tiles", lambda: False)
    with pytest.raises(MissingError, match="LLMC_MATMUL=tiles: this processor has no AMX tiles"):
        device.open_kernels("cpu", "fp32", 1)


def test_more_threads_than_numba_started_with():
    device.open_kernels("cpu", "fp32", 1)
    with pytest.raises(MissingError, match="NUMBA_NUM_THREADS=100000"):
        device.open_kernels("cpu", "fp32", 100_000)


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
def test_importing_program_is_not_surprised(tmp_path, monkeypatch, more):
    """Importing loads nothing heavy; opening leaves numba's settings and the environment as they were, but for more
    threads than cores."""
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    subprocess.run([sys.executable, "-c", PROGRAM.replace("MORE", str(more))], check=True, cwd=tmp_path)


def test_one_thread_by_the_environment(tmp_path):
    program = "from llmc_cli.kernels.backend import open_kernels; print(open_kernels('cpu', 'fp32', None).threads)"
    environment = {**os.environ, "NUMBA_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.stdout == "1\n", run.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
def test_no_tiles_where_numba_compiles_for_another_processor():
    """LLVM would end the process over instructions that it was told not to use."""
    settings = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma"}
    program = "from llmc_cli.kernels.cpu.amx import intrinsics; print(intrinsics.available())"
    run = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"
