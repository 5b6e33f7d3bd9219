import os

import pytest
from support.benchmark_inputs import ignore, make_benchmark

from llmc_cli.benchmark import benchmark
from llmc_cli.benchmark.benchmark import BenchOptions
from llmc_cli.benchmark.results import WorkerInfo
from llmc_cli.errors import MissingError, UsageError


def test_precision_differences_between_llmc_and_pytorch():
    torch = [WorkerInfo("train", mode, {"precision": "fp32"}, 5) for mode in ("torch eager", "torch compiled")]
    for precision, differences in (("fp32", {}), ("bf16x3", {"train": ("bf16x3", "fp32")})):
        llmc = [WorkerInfo("prepro", "llmc", {}, 5), WorkerInfo("train", "llmc", {"precision": precision}, 5)]
        assert make_benchmark(workers=[*llmc, *torch]).precision_differences == differences


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 33}, "--seq-len 33: expected at most 32, the context length of"),
        ({"seq_len": 32}, "--seq-len 32: expected less than 32, .* room for sampling"),
        ({"sections": ("prepro",), "against_torch": True}, "no PyTorch equivalent of prepro"),
        ({"model": "d7"}, "unknown model 'd7'"),
        ({"peak_tflops": 0.0}, "--peak-tflops 0: expected a number above 0"),
        ({"peak_tflops": float("nan")}, "--peak-tflops nan"),
        (
            {"sections": ("kernels",), "peak_tflops": 1.0},
            "--peak-tflops applies to train only, .* no effect on kernels",
        ),
    ],
)
def test_invalid_options_are_rejected_before_measuring(monkeypatch, tiny_config, changes, message):
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda backend: pytest.fail("measured"))
    with pytest.raises(UsageError, match=message):
        benchmark.run_benchmark(BenchOptions(**{"model": str(tiny_config), "seq_len": 8, **changes}), ignore)


def test_missing_torch_names_the_package_to_install(monkeypatch, tiny_config):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'llmc-cli\[witness\]'"):
        benchmark.run_benchmark(BenchOptions(model=str(tiny_config), seq_len=8, against_torch=True), ignore)


def test_compile_time_is_reported_only_if_kernels_were_compiled(monkeypatch, backend):
    monkeypatch.setattr(benchmark, "open_kernels", lambda *arguments: backend)
    monkeypatch.setattr(benchmark, "open_sampling", lambda *arguments: backend)
    assert benchmark._open_backend(BenchOptions(), ignore) == (backend, None)

    def compile_first(device, precision, threads, on_compile, training):
        assert training
        on_compile("compiling")
        return backend

    messages = []
    monkeypatch.setattr(benchmark, "open_kernels", compile_first)
    _, seconds = benchmark._open_backend(BenchOptions(), messages.append)
    assert seconds is not None
    assert messages == ["compiling"]


def test_high_load_is_logged(monkeypatch):
    messages = []
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 9, 9), raising=False)
    assert benchmark._load_average(4, messages.append) == 0.2
    assert messages == []
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0, 0), raising=False)
    assert benchmark._load_average(4, messages.append) == 3.0
    assert messages == ["this machine is busy (load average 3.0 on 4 cores): the times will be unreliable"]
    monkeypatch.delattr(os, "getloadavg")
    assert benchmark._load_average(4, messages.append) is None
