"""A benchmark as a whole: the start of the program, what is refused before anything is measured, what is told of."""

import os

import pytest
from support import benchmark_inputs
from support.benchmark_inputs import quiet, work

from llmc_cli.benchmark import benchmark, startup
from llmc_cli.benchmark.benchmark import BenchOptions
from llmc_cli.benchmark.results import Side
from llmc_cli.errors import MissingError, UsageError


def test_warm_and_cold_start(monkeypatch, tiny_config):
    environments = []

    def first_step(work, model, tokens, environment):
        environments.append(environment)
        return 30.0 if environment["LLMC_CACHE"] != "kept" else 2.0

    monkeypatch.setenv("LLMC_CACHE", "kept")
    monkeypatch.setattr(startup, "first_step", first_step)
    measured = startup.measure_start(work("start"), str(tiny_config), quiet)
    assert {row.name: row.seconds for row in measured.rows} == {
        "start/warm": 2.0,
        "start/cold": 30.0,
        "start/cold/compile": 28.0,
    }
    assert len({each["LLMC_CACHE"] for each in environments}) == 3  # an empty one for each cold run


@pytest.mark.usefixtures("backend")
def test_a_first_step_is_made(tiny_config, tiny_data):
    tokens = tiny_data / "tiny_train_0.bin"
    assert 0 < startup.first_step(work("start"), str(tiny_config), tokens, dict(os.environ)) < 60
    with pytest.raises(MissingError, match=r"llmc train ended with status 3: .*missing\.bin"):
        startup.first_step(work("start"), str(tiny_config), tiny_data / "missing.bin", dict(os.environ))


def test_another_precision_of_pytorch_is_known():
    theirs = [Side("train", side, {"precision": "fp32"}, 5) for side in ("torch eager", "torch compiled")]
    for precision, found in (("fp32", {}), ("bf16x3", {"train": ("bf16x3", "fp32")})):
        ours = [Side("prepro", "llmc", {}, 5), Side("train", "llmc", {"precision": precision}, 5)]
        assert benchmark_inputs.benchmark(sides=[*ours, *theirs]).other_precisions == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 33}, "--seq-len 33: .* has 32 positions"),
        ({"seq_len": 32}, "no room to sample"),
        ({"sections": ("prepro",), "against_torch": True}, "no part in prepro"),
        ({"model": "d7"}, "unknown model 'd7'"),
        ({"peak_tflops": 0.0}, "--peak-tflops 0: expected a number above 0"),
        ({"peak_tflops": float("nan")}, "--peak-tflops nan"),
        ({"sections": ("kernels",), "peak_tflops": 1.0}, "for the MFU of train, which is not among kernels"),
    ],
)
def test_what_cannot_be_is_refused_at_once(monkeypatch, tiny_config, changes, message):
    monkeypatch.setattr(benchmark, "measure_ceilings", lambda backend: pytest.fail("measured"))
    with pytest.raises(UsageError, match=message):
        benchmark.run(BenchOptions(**{"model": str(tiny_config), "seq_len": 8, **changes}), quiet)


def test_without_torch_the_line_to_install_it(monkeypatch, tiny_config):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'llmc-cli\[witness\]'"):
        benchmark.run(BenchOptions(model=str(tiny_config), seq_len=8, against_torch=True), quiet)


def test_the_time_of_compiling_is_known_where_it_was_done(monkeypatch, backend):
    monkeypatch.setattr(benchmark, "open_kernels", lambda *arguments: backend)
    assert benchmark._open(BenchOptions(), quiet) == (backend, None)

    def compile_first(device, precision, threads, on_compile, training):
        assert training
        on_compile("compiling")
        return backend

    said = []
    monkeypatch.setattr(benchmark, "open_kernels", compile_first)
    _, seconds = benchmark._open(BenchOptions(), said.append)
    assert seconds is not None
    assert said == ["compiling"]


def test_a_busy_machine_is_told_of(monkeypatch):
    said = []
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 9, 9), raising=False)
    assert benchmark._load(4, said.append) == 0.2
    assert said == []
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0, 0), raising=False)
    assert benchmark._load(4, said.append) == 3.0
    assert said == ["this machine is busy (load 3.0 on 4 cores): times will mean little"]
    monkeypatch.delattr(os, "getloadavg")
    assert benchmark._load(4, said.append) is None
