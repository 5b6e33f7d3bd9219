"""``bench`` on the fake CuPy: its results and messages, not its timings."""

import json
import os
import subprocess
import sys

import pytest
from support.paths import CUDA_EMULATOR

pytestmark = pytest.mark.usefixtures("requires_gxx")


SMALL = """
from llmc_cli.benchmark import ceilings
ceilings.CUDA_SHAPES, ceilings.CUDA_ELEMENTS = ((64, 32, 48), (32, 32, 32)), 5000
from llmc_cli.app import main
main()
"""
"""The program, with ceilings that an emulator can measure."""

REFUSING = """
import cupy

def refuse(stream):
    raise cupy.cuda.runtime.CUDARuntimeError(900)

cupy.cuda.Stream.begin_capture = refuse
"""
"""What Python runs at its start, where nothing may be captured."""


def bench(section, config, *arguments, **environment):
    given = ["bench", section, "--model", config, "-b", 2, "-t", 8, "--steps", 1, "--device", "cuda", *arguments]
    return subprocess.run(
        [sys.executable, "-c", SMALL, *map(str, given)],
        capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(CUDA_EMULATOR), **environment},
    )  # fmt: skip


def document(*arguments, **environment):
    result = bench(*arguments, "--json", "--quiet", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_training(tiny_config):
    """In bfloat16, which "auto" is there; the peak is the user's, and launches are counted to the last one."""
    found = document("train", tiny_config, "--peak-tflops", 2.5, "--recompute", 0)
    assert (found["settings"]["device"], found["settings"]["precision"]) == ("cuda:0", "bf16")
    assert "emulator" in found["machine"]["card"]
    assert list(found["ceilings"]["matmul"]) == ["64 x 32 x 48", "32 x 32 x 32"]
    assert list(found["ceilings"]["memory"]) == ["read", "copy", "update"]
    step, *parts = found["rows"]
    assert step["name"] == "train/step"
    assert step["ceiling"] == "MFU of 2.5 TFLOP/s"
    assert step["share"] == pytest.approx(step["flops_per_s"] / 2.5e12)
    launches = {part["name"].removeprefix("train/step/"): part["launches"] for part in parts}
    assert launches["linear_forward"] == 2 * (3 + 1)  # of two layers: three products, of which one has its bias added
    assert launches["adamw"] == 1
    # as graphs the forward and the backward pass; beside them the update, whose weights are rounded at its end
    assert step["launches"] == 2 + launches["sum_squares"] + launches["adamw"] + 1
    (side,) = found["sides"]
    assert 1e5 < side["peak_memory"] < 1e8  # of the device; a process holds more


def test_training_as_text(tiny_config):
    result = bench("train", tiny_config, "--precision", "tf32")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "ceiling\ttf32"
    step = next(line.split("\t") for line in lines if line.startswith("train/step\t"))
    assert step[-1] == "MFU"
    assert any(line.startswith("train/step: ") and " launches of kernels" in line for line in lines)


def test_failed_graph_capture_is_reported(tiny_config, tmp_path):
    """The worker process warns on stderr, and the warning is part of the JSON results."""
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    path = os.pathsep.join((str(tmp_path), str(CUDA_EMULATOR)))
    result = bench("train", tiny_config, "--json", PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    warning = "--device cuda: CUDA graph capture failed, kernels are launched one by one: "
    assert f"train: warning from llmc: {warning}" in " ".join(result.stderr.split())
    (side,) = json.loads(result.stdout)["sides"]
    assert side["configuration"]["warnings"].startswith(warning)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels(tiny_config, precision):
    from llmc_cli.kernels.operations import OPERATIONS

    found = document("kernels", tiny_config, "--precision", precision)
    rows = {row["name"]: row for row in found["rows"]}
    assert {name.removeprefix("kernels/").split()[0] for name in rows} == set(OPERATIONS)
    assert all(row["seconds"] > 0 and row["share"] > 0 for row in rows.values())


def test_sampling(tiny_config):
    found = document("sample", tiny_config, LLMC_EMULATOR_SEED="5")
    assert [row["name"] for row in found["rows"]] == ["sample/token fp32", "sample/token bf16"]
    full, half = found["rows"]
    assert half["bytes_per_s"] * half["seconds"] == pytest.approx(full["bytes_per_s"] * full["seconds"] / 2)


def test_device_without_bf16_samples_in_float32(tiny_config):
    found = document("sample", tiny_config, LLMC_EMULATOR_CAPABILITY="75")
    assert [row["name"] for row in found["rows"]] == ["sample/token fp32"]


def test_int8_weights_require_the_cpu(tiny_config):
    result = bench("sample", tiny_config, "--precision", "int8")
    assert result.returncode == 4
    assert "int8: supported on the CPU only" in " ".join(result.stderr.split())


def test_startup(tiny_config, tiny_data, monkeypatch):
    from llmc_cli.benchmark import startup
    from llmc_cli.benchmark.job import Job
    from llmc_cli.models.config import ModelConfig

    monkeypatch.setenv("PYTHONPATH", str(CUDA_EMULATOR))
    job = Job("llmc", "start", ModelConfig(32, 67, 2, 2, 16), 2, 8, 1, "cuda:0", "fp32", 1)
    assert 0 < startup.time_first_step(job, str(tiny_config), tiny_data / "tiny_train_0.bin", dict(os.environ)) < 60


def test_unusable_pytorch_is_an_error(tiny_config, tmp_path):
    """PyTorch that cannot be loaded or lacks the device is an error."""
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')")
    path = os.pathsep.join((str(CUDA_EMULATOR), str(tmp_path)))
    result = bench("train", tiny_config, "--against", "torch", "--quiet", PYTHONPATH=path)
    assert (result.returncode, result.stdout) == (4, "")
    assert result.stderr == "llmc: --against torch: train: ImportError: broken on purpose\n"


@pytest.mark.witness
def test_pytorch_without_a_gpu_is_an_error(tiny_config):
    result = bench("sample", tiny_config, "--against", "torch", "--quiet", CUDA_VISIBLE_DEVICES="-1")
    assert (result.returncode, result.stdout) == (4, "")
    assert "--against torch: sample: PyTorch 2" in result.stderr
    assert result.stderr.count("finds no CUDA device") == 1


def test_device_with_too_little_memory(tiny_config):
    result = bench("train", tiny_config, "-b", 100_000, "--quiet", LLMC_EMULATOR_MEMORY=str(40 << 20))
    assert (result.returncode, result.stdout) == (4, "")
    assert "llmc failed: OutOfMemoryError" in result.stderr
    assert "use a smaller --batch" in result.stderr
