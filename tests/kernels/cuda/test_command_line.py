"""The CUDA backend through the command line: on the emulator in subprocesses, and on a GPU with the marker ``gpu``."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from support.paths import CUDA_EMULATOR, FIXTURES, TINY_GPT2

SAMPLING_MODEL = FIXTURES / "sampling_model.bin"

emulated = pytest.mark.usefixtures("requires_gxx")


def llmc(*arguments, emulator=None, cwd=None, **environment):
    """Run a command in a subprocess, on the fake CuPy with the settings ``emulator`` unless that is None."""
    environment = {**os.environ, **environment}
    if emulator is not None:
        environment |= {"PYTHONPATH": str(CUDA_EMULATOR), **emulator}
    command = [sys.executable, "-m", "llmc_cli.app", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=cwd)


CHECKED = {"LLMC_EMULATOR_CHECK": "1", "LLMC_EMULATOR_SEED": "7"}


def check(run):
    """Assert that the command succeeded and that no graph capture was rejected, which is only a warning."""
    assert run.returncode == 0, run.stdout + run.stderr
    assert "graph capture failed" not in " ".join(run.stderr.split())


def losses(run):
    check(run)
    return [line["loss"] for line in map(json.loads, run.stdout.splitlines()) if "loss" in line]


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def on(request):
    """Return on(settings), the ``emulator`` argument of llmc(): the settings on the emulator, None on a GPU."""
    if request.param == "gpu":
        return lambda settings: None
    request.getfixturevalue("requires_gxx")
    return lambda settings: settings


@pytest.fixture
def training(tiny_config, tiny_data):
    return [
        "train", "--model", tiny_config, "-i", tiny_data / "tiny_train_*.bin", "-j", tiny_data / "tiny_val_*.bin",
        "-b", 2, "-t", 16, "-d", 64, "-x", 10, "-v", 5, "-m", 2, "-s", 5, "-g", 8, "-l", 0.01, "-u", 3, "-c", 0.1,
        "--threads", 1, "--json", "--quiet",
    ]  # fmt: skip


@pytest.mark.parametrize("recompute", [0, 2])
def test_losses_match_the_cpu(training, on, recompute):
    arguments = [*training, "--precision", "fp32", "-r", recompute]
    expected = losses(llmc(*arguments, "--device", "cpu"))
    found = losses(llmc(*arguments, "--device", "cuda", emulator=on(CHECKED)))
    assert len(found) == 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_losses_with_reduced_precision(training, on, precision):
    """Losses are as close to float32 as the CPU's bf16."""
    from llmc_cli.verification.bounds import BOUNDS

    expected = losses(llmc(*training, "--precision", "fp32", "--device", "cpu"))
    found = losses(llmc(*training, "--precision", precision, "--device", "cuda", emulator=on(CHECKED)))
    assert found != expected
    np.testing.assert_allclose(found, expected, rtol=BOUNDS["bf16"].tiny_loss, atol=0)


@pytest.mark.parametrize(("first", "second"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_resume_on_another_device(training, on, tmp_path, first, second):
    arguments = [*training, "--precision", "fp32", "-n", 5, "-o", tmp_path / "run"]
    whole = losses(llmc(*training, "--precision", "fp32", "--device", "cpu"))
    begun = losses(llmc(*arguments, "--device", first, emulator=on({})))
    assert begun == pytest.approx(whole, abs=1e-5)
    for path in (tmp_path / "run").glob("*_00000010*"):
        path.unlink()
    resumed = losses(llmc(*arguments, "-y", 1, "--device", second, emulator=on({})))
    assert resumed == pytest.approx(whole[5:], abs=1e-5)


def test_greedy_samples(on):
    arguments = ["sample", SAMPLING_MODEL, "--prompt-ids", "1 2 3", "--temperature", 0, "--max-tokens", 64, "--ids",
                 "--quiet", "--threads", 1]  # fmt: skip
    expected = llmc(*arguments, "--device", "cpu")
    assert expected.returncode == 0, expected.stderr
    for seed in "1", "2":
        found = llmc(*arguments, "--device", "cuda", emulator=on({**CHECKED, "LLMC_EMULATOR_SEED": seed}))
        check(found)
        assert found.stdout == expected.stdout


def test_several_samples(on):
    arguments = ["sample", SAMPLING_MODEL, "--prompt-ids", "1 2 3", "--num", 3, "--max-tokens", 8, "--ids", "--quiet",
                 "--threads", 1]  # fmt: skip
    expected, found = llmc(*arguments, "--device", "cpu"), llmc(*arguments, "--device", "cuda", emulator=on(CHECKED))
    check(found)
    assert found.stdout == expected.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_verify_state(on, precision):
    run = llmc("verify", TINY_GPT2 / "model.bin", "--state", TINY_GPT2 / "debug_state.bin", "--device", "cuda",
               "--precision", precision, emulator=on({}))  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "overall okay: 1" in run.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_verify_kernels(on, precision):
    run = llmc("verify", "--device", "cuda", "--precision", precision, emulator=on({"LLMC_EMULATOR_SEED": "3"}))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "overall okay: 1" in run.stdout


@emulated
def test_memory_error_names_the_device_and_what_fits(training):
    plan = json.loads(llmc(*training, "--dry-run", "--device", "auto", emulator={}).stdout)
    assert (plan["device"], plan["precision"]) == ("cuda:0", "bf16")
    assert "program" not in plan["memory"]
    least = sum(plan["memory"][name] for name in ("parameters", "gradients", "moments"))
    memory = {"LLMC_EMULATOR_MEMORY": str(plan["total_memory"] - 1000)}
    run = llmc(*training, "--device", "cuda", emulator=memory)
    assert run.returncode == 4
    assert "GB are free on cuda:0" in run.stderr
    assert "--batch 1 would fit" in run.stderr
    run = llmc(*training, "--device", "cuda", emulator={"LLMC_EMULATOR_MEMORY": str(least)})
    assert "use a smaller model or sequence length" in run.stderr


def refused(**options):
    start = time.perf_counter()
    run = llmc("train", "--device", "cuda", **options)
    seconds = time.perf_counter() - start
    assert run.returncode == 4, run.stderr
    assert "Traceback" not in run.stderr
    return " ".join(run.stderr.split()), seconds


def test_missing_cupy_is_an_error(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libfoo.so: cannot open')")
    message, _ = refused(PYTHONPATH=str(tmp_path))
    assert "CuPy is installed but cannot be loaded: libfoo.so: cannot open" in message
    hidden = "import sys; sys.modules['cupy'] = None; sys.argv = ['llmc', 'train', '--device', 'cuda']\n"
    (tmp_path / "hidden.py").write_text(hidden + "from llmc_cli.app import main; main()")
    run = subprocess.run([sys.executable, tmp_path / "hidden.py"], capture_output=True, text=True)
    assert run.returncode == 4, run.stderr
    assert "CuPy is not installed; run pip install 'llmc-cli[cuda13]'" in " ".join(run.stderr.split())


def test_two_cupy_packages_are_an_error(tmp_path):
    for name in ("cupy_cuda12x", "cupy_cuda13x"):
        folder = tmp_path / f"{name}-14.0.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 14.0.0\n")
    message, _ = refused(PYTHONPATH=str(tmp_path))
    assert "cupy-cuda12x and cupy-cuda13x are both installed" in message
    assert "pip uninstall cupy-cuda12x cupy-cuda13x" in message


@emulated
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"LLMC_EMULATOR_DRIVER": "0"}, "no NVIDIA driver"),
        ({"LLMC_EMULATOR_DRIVER": "11040"}, "the driver supports CUDA 11.4"),
        ({"LLMC_EMULATOR_DEVICES": "0"}, "no usable device"),
        ({"LLMC_EMULATOR_CAPABILITY": "70"}, "compute capability 7.0"),
    ],
)
def test_unusable_driver_or_device_is_an_error(settings, words):
    message, seconds = refused(emulator=settings)
    assert words in message
    assert seconds < 30  # on a busy machine; a person sees it within one


@emulated
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--device", "cuda:3"), "no such device; available: cuda:0"),
        (("--device", "cuda", "--precision", "bf16x3"), "supported on the CPU only; use --precision fp32 or bf16"),
    ],
)
def test_unsupported_device_options_are_errors(arguments, words):
    run = llmc("train", *arguments, emulator={})
    assert (run.returncode, words in " ".join(run.stderr.split())) == (4, True), run.stderr


@emulated
def test_device_without_bf16_supports_float32_only():
    old = {"LLMC_EMULATOR_CAPABILITY": "75"}
    run = llmc("train", "--device", "cuda", "--precision", "bf16", emulator=old)
    assert run.returncode == 4
    assert "requires compute capability 8.0; " in " ".join(run.stderr.split())
    run = llmc(
        "verify", TINY_GPT2 / "model.bin", "--state", TINY_GPT2 / "debug_state.bin", "--device", "cuda", emulator=old
    )
    assert run.returncode == 0, run.stderr
