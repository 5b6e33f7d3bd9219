"""What a benchmark measures and how it judges; never how fast this machine is."""

import dataclasses
import inspect
import json
import os

import numpy as np
import pytest

from llmc_cli import benchmarking, contest, measuring, starting
from llmc_cli.baseline import Baseline, read_baseline, this_machine
from llmc_cli.benchmarking import Benchmark, BenchOptions
from llmc_cli.ceilings import Ceilings, matmul_flops, memory_bandwidth
from llmc_cli.chart import draw, require_chart
from llmc_cli.costs import COSTS, Cost, TimedKernels
from llmc_cli.device import open_sampling
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.kernels.spec import Kernels
from llmc_cli.measuring import Row, Side, measure, model_flops_utilization, share_of_ceiling
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.layout import parameter_count
from llmc_cli.process_memory import peak_memory
from llmc_cli.waiting import PASSIVE, users_environment, wait_passively
from llmc_cli.work import Work
from llmc_cli.workloads import KernelsWorkload, SampleWorkload, TrainWorkload

CONFIG = ModelConfig(16, 67, 2, 2, 16)
NOT_TIMED = ("alloc", "upload", "download", "copy", "synchronize", "workspace_bytes", "bound_bytes", "bind",
             "publish")  # fmt: skip
CEILINGS = Ceilings("fp32", {"1 x 1 x 1": 100e9, "2 x 2 x 2": 80e9}, {"read": 10e9, "copy": 8e9})


def work(section, **changes):
    return Work(**{"side": "llmc", "section": section, "config": CONFIG, "batch": 2, "seq_len": 8, "steps": 2,
                   "device": "cpu", "precision": "fp32", "threads": 1, **changes})  # fmt: skip


def quiet(text):
    pass


# costs


def test_every_operation_has_a_cost_with_the_same_arguments():
    operations = {
        name: list(inspect.signature(function).parameters)[1:]
        for name, function in vars(Kernels).items()
        if inspect.isfunction(function) and not name.startswith("_") and name not in NOT_TIMED
    }
    assert {name: list(inspect.signature(cost).parameters) for name, cost in COSTS.items()} == operations


def new(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "flops", "moved"),
    [
        ("linear_forward", (new(2, 3), new(2, 5), None, new(3)), 2 * 30, 4 * (6 + 10 + 3 + 15)),
        ("linear_backward", (new(2, 5), new(3, 5), new(3), new(2, 3), new(2, 5), None, False),
         4 * 30, 4 * (10 + 15 + 3 + 6 + 10 + 15)),
        ("linear_backward", (None, new(3, 5), None, new(2, 3), new(2, 5), None, True), 2 * 30, 4 * (2 * 15 + 6 + 10)),
        # two sequences, three positions, four channels: 6 of the 9 pairs, two products
        ("attention_forward", (new(2, 3, 4), new(2, 2, 3), new(2, 3, 12), 2), 2 * 2 * 2 * 6 * 4, 4 * (24 + 12 + 72)),
        ("attention_cached", (new(1, 1, 4), new(1, 2, 9, 2), new(1, 2, 9, 2), new(1, 1, 12), np.array([5]), 2),
         2 * 2 * 6 * 4, 4 * (4 + 12 + 2 * 6 * 4)),
        ("head_loss", (new(2), new(2, 3), new(8, 3), new(2, 3), None, np.zeros(2, np.int32), 7, 1.0, False),
         3 * 2 * 2 * 3 * 7, 4 * (2 + 6 + 24 + 6 + 2 + 21)),
        ("sum_squares", (np.zeros(1), new(9)), 18, 36),
    ],
)  # fmt: skip
def test_costs_by_hand(name, arguments, flops, moved):
    assert COSTS[name](*arguments) == Cost(flops, moved)


def test_timed_kernels_add_up_calls_time_and_cost(backend):
    timed = TimedKernels(backend.kernels)
    out, g = timed.alloc((1,), np.float64), timed.alloc((9,), np.float32)
    g[:] = 2
    for _ in range(3):
        timed.sum_squares(out, g)
    assert out[0] == 36
    assert timed.calls == {"sum_squares": 3}
    assert timed.cost == {"sum_squares": Cost(54, 108)}
    assert timed.seconds["sum_squares"] > 0


# ceilings


def test_the_share_is_that_of_what_bounds_the_work():
    assert share_of_ceiling(50e9, 1e9, CEILINGS) == (0.5, "matmul")
    assert share_of_ceiling(5e9, 8e9, CEILINGS) == (0.8, "memory")


def test_the_share_of_training_is_by_a_published_peak_where_there_is_one():
    assert model_flops_utilization(50e9, CEILINGS) == (0.5, "MFU")
    published = dataclasses.replace(CEILINGS, published=2e12)
    assert model_flops_utilization(50e9, published) == (0.025, "MFU of 2 TFLOP/s")


def test_ceilings_are_measured(backend):
    assert matmul_flops(backend.kernels, 16, 16, 16) > 0
    found = memory_bandwidth(backend.kernels, 2, 1 << 10)
    assert list(found) == ["read", "copy", "update"]
    assert min(found.values()) > 0


# our workloads


def test_kernels_workload_covers_every_operation_and_runs(backend):
    workload = KernelsWorkload(backend.kernels, CONFIG, 2, 8)
    assert {task.split()[0] for task in workload.tasks} == set(COSTS)
    for name in workload.tasks:
        task = workload.prepare(name)
        for _ in range(2):
            task.run()
        assert min(task.cost) > 0, name


def test_train_workload_makes_the_trainers_steps(backend):
    workload = TrainWorkload(backend.kernels, CONFIG, 2, 8)
    step = workload.prepare("step")
    first = step.run()
    assert first["loss"] == pytest.approx(np.log(67), rel=0.05)
    assert first["norm"] > 0
    split = workload.prepare("split").run()
    assert {"head_loss", "linear_backward", "adamw", "sum_squares"} < set(split)
    assert split["residual_norm_forward"]["calls"] == 2 * CONFIG.num_layers + 1
    for _ in range(3):
        assert workload.step()["loss"] < first["loss"]
    assert workload.model.kernels is backend.kernels
    assert step.cost.flops == 16 * (6 * parameter_count(CONFIG) + 6 * 2 * 16 * 8)


def test_sample_workload_counts_the_bytes_that_weights_are_kept_in(backend):
    bf16 = open_sampling("cpu", "bf16", 1).kernels
    workload = SampleWorkload({"fp32": backend.kernels, "bf16": bf16}, CONFIG, 2, 14)
    assert workload.tasks == ("token fp32", "token bf16")
    matrices = 2 * 12 * 16 * 16  # two layers
    head = CONFIG.padded_vocab_size * 16
    full, half = (workload.prepare(task) for task in workload.tasks)
    assert full.cost == Cost(2 * 2 * (matrices + head), 4 * (matrices + head))
    padded = 2 * (3 * 16 + 16 + 4 * 16 + 16) * 64 + CONFIG.padded_vocab_size * 64  # rows of 16 and 64 are 64 long
    assert half.cost == Cost(full.cost.flops, 2 * padded)
    assert full.parts == half.parts == 2  # what the context leaves
    for task in (full, half, full):
        task.run()


# processes


def test_work_survives_the_command_line():
    assert Work.from_text(work("train").text()) == work("train")


def test_peak_memory_is_this_processs():
    peak = peak_memory()
    assert peak is None or 10e6 < peak < 1e12


def test_our_settings_are_kept_from_others_and_the_users_are_not(monkeypatch):
    name, other = PASSIVE
    monkeypatch.setattr("llmc_cli.waiting._set_here", set())
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(other, "the user's")
    wait_passively()
    assert os.environ[name] == PASSIVE[name]
    assert name not in users_environment()
    assert users_environment()[other] == "the user's"


def test_a_training_section():
    measured = measure(work("train"), CEILINGS, False, quiet)
    step, *parts = measured.rows
    assert step.name == "train/step"
    assert step.runs == 2
    assert step.ceiling == "MFU"
    assert step.tokens_per_s == pytest.approx(16 / step.seconds)
    assert step.share == pytest.approx(step.flops_per_s / CEILINGS.flops)
    assert {"train/step/adamw", "train/step/other"} < {part.name for part in parts}
    assert [part.seconds for part in parts[:-1]] == sorted((part.seconds for part in parts[:-1]), reverse=True)
    assert [side.side for side in measured.sides] == ["llmc"]
    assert measured.sides[0].configuration["threads"] == 1
    assert not step.torch
    assert step.best_mode == ""


def test_a_preprocessing_section_is_held_against_the_tokenizer():
    files, tokenizer = measure(work("prepro"), CEILINGS, False, quiet).rows
    assert files.ceiling == "tokenizer"
    assert files.share == pytest.approx(tokenizer.seconds / files.seconds)
    assert files.tokens_per_s > 0


def test_turns_alternate_and_warm_up_does_not_count(monkeypatch):
    order = []

    class Fake:
        def __init__(self, side, seconds):
            self.side, self.seconds = side, iter(seconds)

        def ask(self, task, untimed):
            order.append((self.side, task, untimed))
            return contest.Answer(next(self.seconds), 0)

    monkeypatch.setattr(contest, "SETTLE_S", 0)
    monkeypatch.setattr(contest, "TELL_EVERY_S", 0)
    said = []
    answers = contest.alternate([Fake("a", [9, 1, 2]), Fake("b", [9, 3, 4])], "step", 2, 1, 1, said.append)
    assert said == ["step: 2 runs, about 0 s", "step: 0 of 2 runs", "step: 1 of 2 runs"]
    assert order == [("a", "step", 1), ("b", "step", 1)] * 3
    assert {side: [answer.seconds for answer in each] for side, each in answers.items()} == {"a": [1, 2], "b": [3, 4]}


class Slow:
    """A side whose turns take ``seconds`` on a clock of the test's."""

    side = "a"

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.asked = clock, seconds, 0

    def ask(self, task, untimed):
        self.asked += 1
        self.clock[0] += self.seconds
        return contest.Answer(self.seconds, 0)


@pytest.mark.parametrize(
    ("seconds", "budget", "warm_up", "runs"),
    [
        (0.5, 120, 2, 10),  # short: as asked
        (5, 20, 2, 4),  # as many as the budget has time for
        (50, 120, 1, 3),  # but some, and one turn to warm up
        (50, None, 1, 10),  # the number was given
    ],
)
def test_long_turns_are_made_less_often(monkeypatch, seconds, budget, warm_up, runs):
    clock, said = [0.0], []
    monkeypatch.setattr(contest.time, "monotonic", lambda: clock[0])
    side = Slow(clock, seconds)
    (answers,) = contest.alternate([side], "step", 10, 2, 0, said.append, budget).values()
    assert (side.asked, len(answers)) == (warm_up + runs, runs)
    whole = f"about {runs * seconds:.0f} s"
    assert any(whole in text for text in said) == (runs * seconds >= contest.TELL_EVERY_S)
    assert any("instead of 10" in text for text in said) == (runs < 10)


def test_a_side_that_cannot_is_an_error_for_us_and_an_absence_for_others(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with contest.contest([work("sample"), work("sample", side="torch eager")]) as (contestants, absent):
        assert [contestant.side for contestant in contestants] == ["llmc"]
    assert absent == {"torch eager": "ImportError: broken on purpose"}
    with (
        pytest.raises(MissingError, match=r"bench sample: llmc cannot do this: --device cuda: "),
        contest.contest([work("sample", device="cuda")]),
    ):
        pass


def test_modules_in_the_folder_at_hand_are_not_taken_for_others(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise ImportError('somebody else')\n")
    monkeypatch.chdir(tmp_path)
    with contest.contest([work("prepro")]) as (contestants, _):
        assert contestants[0].tasks == ("files", "tokenizer")


def test_a_process_that_dies_is_told_of():
    with contest.contest([work("prepro")]) as (contestants, _):
        contestants[0]._process.kill()
        with pytest.raises(MissingError, match="bench prepro: llmc cannot do this: the process ended with status"):
            contest.alternate(contestants, "files", 1, 0, 0, quiet)


# the start of the program


def test_warm_and_cold_start(monkeypatch, tiny_config):
    environments = []

    def first_step(work, model, tokens, environment):
        environments.append(environment)
        return 30.0 if environment["LLMC_CACHE"] != "kept" else 2.0

    monkeypatch.setenv("LLMC_CACHE", "kept")
    monkeypatch.setattr(starting, "first_step", first_step)
    measured = starting.measure_start(work("start"), str(tiny_config), quiet)
    assert {row.name: row.seconds for row in measured.rows} == {
        "start/warm": 2.0,
        "start/cold": 30.0,
        "start/cold/compile": 28.0,
    }
    assert len({each["LLMC_CACHE"] for each in environments}) == 3  # an empty one for each cold run


@pytest.mark.usefixtures("backend")
def test_a_first_step_is_made(tiny_config, tiny_data):
    tokens = tiny_data / "tiny_train_0.bin"
    assert 0 < starting.first_step(work("start"), str(tiny_config), tokens, dict(os.environ)) < 60
    with pytest.raises(MissingError, match=r"llmc train ended with status 3: .*missing\.bin"):
        starting.first_step(work("start"), str(tiny_config), tiny_data / "missing.bin", dict(os.environ))


# baselines, with made-up numbers


def row(name, seconds, **changes):
    return Row(**{"name": name, "seconds": seconds, "best": seconds, "runs": 5, "share": 0.5, "ceiling": "memory",
                  **changes})  # fmt: skip


SETTINGS = {"model": "d12", "config": {"channels": 768}, "device": "cpu", "precision": "fp32", "threads": 2,
            "sections": {"train": {"batch": 4, "seq_len": 64}}}  # fmt: skip


def benchmark(*rows, **changes):
    return Benchmark(
        **{"machine": this_machine(), "versions": {"python": "3"}, "settings": SETTINGS, "ceilings": CEILINGS,
           "load": 0.1, "compile_seconds": None, "rows": list(rows),
           "sides": [Side("train", "llmc", {"threads": 2}, 5)],
           "absent": {}, "changes": [], **changes}
    )  # fmt: skip


def test_rows_know_their_ratios():
    made = row("train/step", 2.0, torch={"torch eager": 3.0, "torch compiled": 1.0})
    assert made.ratios == {"torch eager": 1.5, "torch compiled": 0.5}
    assert made.best_mode == "torch compiled"


def test_another_precision_of_pytorch_is_known():
    theirs = [Side("train", side, {"precision": "fp32"}, 5) for side in ("torch eager", "torch compiled")]
    for precision, found in (("fp32", {}), ("bf16x3", {"train": ("bf16x3", "fp32")})):
        ours = [Side("prepro", "llmc", {}, 5), Side("train", "llmc", {"precision": precision}, 5)]
        assert benchmark(sides=[*ours, *theirs]).other_precisions == found


@pytest.mark.parametrize(
    ("section", "precision", "theirs"),
    [("train", "bf16", "bf16"), ("kernels", "bf16", "bf16"), ("train", "bf16x3", "fp32"), ("sample", "bf16", "fp32")],
)
def test_pytorch_takes_part_in_our_precision_where_it_has_it(monkeypatch, section, precision, theirs):
    def contest(works):
        raise StopIteration([each.precision for each in works])

    monkeypatch.setattr(measuring, "contest", contest)
    with pytest.raises(StopIteration) as started:
        measure(work(section, precision=precision), CEILINGS, True, quiet)
    assert started.value.value[0] == precision
    assert set(started.value.value[1:]) == {theirs}


def test_saved_results_are_read_again(tmp_path):
    benchmark(row("train/step", 1.0, torch={"torch eager": 1.5, "torch compiled": 1.2})).save(tmp_path / "b.json")
    document = json.loads((tmp_path / "b.json").read_text())
    assert document["rows"][0]["ratios"] == {"torch eager": 1.5, "torch compiled": 1.2}
    assert document["rows"][0]["best_mode"] == "torch compiled"
    assert document["ceilings"]["flops_per_s"] == 100e9
    baseline = read_baseline(tmp_path / "b.json")
    assert baseline.seconds == {"train/step": 1.0}
    baseline.check(this_machine(), SETTINGS)


def test_changes_are_of_rows_in_both_and_not_of_parts():
    before = Baseline("b", {}, {}, {"train/step": 1.0, "train/step/adamw": 0.1, "sample/token": 0.02, "gone": 1.0})
    changes = before.changes(
        [row("train/step", 1.2), row("train/step/adamw", 0.5, calls=1), row("sample/token", 0.01), row("new", 1.0)]
    )
    assert [change.name for change in changes] == ["train/step", "sample/token"]
    assert [change.slowdown for change in changes] == pytest.approx([0.2, -0.5])


@pytest.mark.parametrize(
    ("machine", "settings", "message"),
    [
        ({"cores": 64}, {}, "cores was 64, is"),
        ({}, {"threads": 1}, "threads was 1, is 2"),
        ({}, {"model": "d6", "config": {"channels": 384}}, "model was d6, is d12"),
        ({}, {"sections": {"train": {"batch": 8, "seq_len": 64}}}, "train: batch was 8, is 4"),
        ({}, {"sections": {"sample": {"batch": 1, "seq_len": 64}}}, "none of these sections"),
    ],
)
def test_a_baseline_of_something_else_is_refused(machine, settings, message):
    baseline = Baseline("b", this_machine() | machine, SETTINGS | settings, {})
    with pytest.raises(UsageError, match=message):
        baseline.check(this_machine(), SETTINGS)


def test_another_name_for_the_same_model_is_no_difference():
    Baseline("b", this_machine(), SETTINGS | {"model": "gpt2:d12"}, {}).check(this_machine(), SETTINGS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 1, "rows": 3}', '{"schema": 2}'])
def test_other_files_are_no_baseline(tmp_path, text):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(DataError, match=r"b\.json: found"):
        read_baseline(tmp_path / "b.json")


# refusals before anything is measured


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 33}, "--seq-len 33: .* has 32 positions"),
        ({"seq_len": 32}, "no room to sample"),
        ({"sections": ("prepro",), "against_torch": True}, "no part in prepro"),
        ({"model": "d7"}, "no model is called 'd7'"),
        ({"peak_tflops": 0.0}, "--peak-tflops 0: expected a number above 0"),
        ({"peak_tflops": float("nan")}, "--peak-tflops nan"),
        ({"sections": ("kernels",), "peak_tflops": 1.0}, "for the MFU of train, which is not among kernels"),
    ],
)
def test_what_cannot_be_is_refused_at_once(monkeypatch, tiny_config, changes, message):
    monkeypatch.setattr(benchmarking, "measure_ceilings", lambda backend: pytest.fail("measured"))
    with pytest.raises(UsageError, match=message):
        benchmarking.run(BenchOptions(**{"model": str(tiny_config), "seq_len": 8, **changes}), quiet)


def test_without_torch_the_line_to_install_it(monkeypatch, tiny_config):
    monkeypatch.setattr(benchmarking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'llmc-cli\[witness\]'"):
        benchmarking.run(BenchOptions(model=str(tiny_config), seq_len=8, against_torch=True), quiet)


def test_the_time_of_compiling_is_known_where_it_was_done(monkeypatch, backend):
    monkeypatch.setattr(benchmarking, "open_kernels", lambda *arguments: backend)
    assert benchmarking._open(BenchOptions(), quiet) == (backend, None)

    def compile_first(device, precision, threads, on_compile, training):
        assert training
        on_compile("compiling")
        return backend

    said = []
    monkeypatch.setattr(benchmarking, "open_kernels", compile_first)
    _, seconds = benchmarking._open(BenchOptions(), said.append)
    assert seconds is not None
    assert said == ["compiling"]


def test_a_busy_machine_is_told_of(monkeypatch):
    said = []
    monkeypatch.setattr(os, "getloadavg", lambda: (0.2, 9, 9), raising=False)
    assert benchmarking._load(4, said.append) == 0.2
    assert said == []
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0, 0), raising=False)
    assert benchmarking._load(4, said.append) == 3.0
    assert said == ["this machine is busy (load 3.0 on 4 cores): times will mean little"]
    monkeypatch.delattr(os, "getloadavg")
    assert benchmarking._load(4, said.append) is None


# charts


@pytest.mark.parametrize(("name", "start"), [("c.svg", b"<?xml"), ("c.PNG", b"\x89PNG")])
@pytest.mark.parametrize("torch", [{}, {"torch eager": 1.1, "torch compiled": 0.9}])
def test_charts_are_drawn(tmp_path, name, start, torch):
    path = tmp_path / name
    require_chart(path)
    draw(benchmark(row("train/step", 1.0, torch=torch), row("train/step/other", 0.1, ceiling="")), path)
    assert path.read_bytes().startswith(start)


def test_charts_need_a_known_ending_and_matplotlib(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"expected \.svg or \.png"):
        require_chart(tmp_path / "c.gif")
    monkeypatch.setattr("llmc_cli.chart.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'llmc-cli\[plot\]'"):
        require_chart(tmp_path / "c.svg")


# live PyTorch


@pytest.mark.witness
def test_torch_takes_turns_at_the_same_operations(monkeypatch):
    monkeypatch.setattr(contest, "SETTLE_S", 0)
    measured = measure(work("kernels"), CEILINGS, True, quiet)
    alone = {row.name for row in measured.rows if not row.torch}
    assert alone == {"kernels/attention_cached", "kernels/embedding_backward"}
    assert measured.absent == {}


@pytest.mark.witness
@pytest.mark.parametrize("section", ["train", "sample"])
def test_torch_takes_turns(monkeypatch, section):
    """Compiled as well, where there is a compiler; where there is none, that is said."""
    monkeypatch.setitem(measuring.WARM_UP, section, 1)
    measured = measure(work(section), CEILINGS, True, quiet)
    first = measured.rows[0]
    assert "torch eager" in first.torch
    modes = set(measuring.TORCH_MODES[section])
    assert modes == set(first.torch) | set(measured.absent)
    assert set(measured.absent) <= {"torch compiled"}
    assert first.ratios[first.best_mode] == min(first.torch.values()) / first.seconds
    configuration = measured.sides[1].configuration
    assert configuration["threads"] == 1
    assert configuration["precision"] == "fp32"
    assert configuration["optimizer"] == "AdamW, fused"
    assert all(side.peak_memory for side in measured.sides)


@pytest.mark.witness
@pytest.mark.parametrize("section", ["kernels", "train"])
def test_torch_in_bf16_runs_under_autocast(section):
    import torch

    from llmc_cli.torch_workloads import KernelsWorkload, open_torch

    made, configuration = open_torch(work(section, side="torch eager", precision="bf16"))
    assert configuration["precision"] == "bf16"
    for name in made.tasks:
        made.prepare(name).run()
    if section == "train":
        assert all(parameter.dtype == torch.float32 for parameter in made.parameters)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        workload = KernelsWorkload(CONFIG, 2, 8, precision)
        assert workload._forward(*workload._linear(16, 16))().dtype == dtype


@pytest.mark.witness
def test_torchs_model_is_the_same_model():
    import torch

    from llmc_cli.torch_workloads import GPT2, TrainWorkload

    torch.manual_seed(0)
    padding = (CONFIG.padded_vocab_size - CONFIG.vocab_size) * CONFIG.channels
    assert sum(p.numel() for p in GPT2(CONFIG).parameters()) == parameter_count(CONFIG) - padding
    workload = TrainWorkload(CONFIG, 2, 8, compiled=False)
    losses = [workload.step()["loss"] for _ in range(4)]
    assert losses[0] == pytest.approx(np.log(67), rel=0.05)
    assert losses[-1] < losses[0]


@pytest.mark.witness
def test_torchs_cached_step_agrees_with_its_whole_pass():
    import torch

    from llmc_cli.torch_workloads import GPT2

    torch.manual_seed(0)
    model, T = GPT2(CONFIG).eval(), 6
    ids = torch.randint(CONFIG.vocab_size, (2, T))
    shape = (CONFIG.num_layers, 2, CONFIG.num_heads, 9, CONFIG.head_size)
    keys, values = torch.zeros(shape), torch.zeros(shape)
    with torch.inference_mode():
        total = 0.0
        for t in range(T - 1):
            logits = model.extend(ids[:, t : t + 1], keys, values, torch.tensor([t]))
            total += torch.nn.functional.cross_entropy(logits, ids[:, t + 1]).item()
        assert total / (T - 1) == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item(), rel=1e-5)
