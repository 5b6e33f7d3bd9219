import io
from types import SimpleNamespace

import pytest
from support.benchmark_inputs import ignore, make_job

from llmc_cli.benchmark import interleave
from llmc_cli.errors import MissingError


def test_workers_alternate_and_warmup_is_not_measured(monkeypatch):
    order = []

    class FakeWorker:
        def __init__(self, implementation, seconds):
            self.implementation, self.seconds = implementation, iter(seconds)

        def run(self, task, warmup_runs):
            order.append((self.implementation, task, warmup_runs))
            return interleave.Measurement(next(self.seconds), 0)

    monkeypatch.setattr(interleave, "PAUSE_S", 0)
    monkeypatch.setattr(interleave, "PROGRESS_INTERVAL_S", 0)
    messages = []
    workers = [FakeWorker("a", [9, 1, 2]), FakeWorker("b", [9, 3, 4])]
    found = interleave.measure_interleaved(workers, "step", 2, 1, 1, messages.append)
    assert messages == ["step: 2 runs, about 0 s", "step: 0 of 2 runs", "step: 1 of 2 runs"]
    assert order == [("a", "step", 1), ("b", "step", 1)] * 3
    assert {name: [each.seconds for each in measurements] for name, measurements in found.items()} == {
        "a": [1, 2],
        "b": [3, 4],
    }


class SlowWorker:
    """A worker whose runs advance a fake clock by ``seconds``."""

    implementation = "a"

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.runs = clock, seconds, 0

    def run(self, task, warmup_runs):
        self.runs += 1
        self.clock[0] += self.seconds
        return interleave.Measurement(self.seconds, 0)


@pytest.mark.parametrize(
    ("seconds", "budget", "warmup_rounds", "runs"),
    [
        (0.5, 120, 2, 10),  # short rounds: all runs
        (5, 20, 2, 4),  # runs that fit into the budget
        (50, 120, 1, 3),  # at least MIN_RUNS, one warm-up round
        (50, None, 1, 10),  # no budget
    ],
)
def test_long_rounds_reduce_the_number_of_runs(monkeypatch, seconds, budget, warmup_rounds, runs):
    clock, messages = [0.0], []
    monkeypatch.setattr(interleave.time, "monotonic", lambda: clock[0])
    worker = SlowWorker(clock, seconds)
    (measurements,) = interleave.measure_interleaved([worker], "step", 10, 2, 0, messages.append, budget).values()
    assert (worker.runs, len(measurements)) == (warmup_rounds + runs, runs)
    estimate = f"about {runs * seconds:.0f} s"
    assert any(estimate in text for text in messages) == (runs * seconds >= interleave.PROGRESS_INTERVAL_S)
    assert any("instead of 10" in text for text in messages) == (runs < 10)


def test_only_the_first_worker_is_required(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = [make_job("sample"), make_job("sample", implementation="torch eager")]
    with interleave.open_workers(jobs) as (workers, unavailable):
        assert [worker.implementation for worker in workers] == ["llmc"]
    assert unavailable == {"torch eager": "ImportError: broken on purpose"}
    with (
        pytest.raises(MissingError, match=r"bench sample: llmc failed: --device cuda"),
        interleave.open_workers([make_job("sample", device="cuda:99")]),
    ):
        pass


def test_worker_ignores_modules_in_the_working_directory(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise ImportError('wrong module')\n")
    monkeypatch.chdir(tmp_path)
    with interleave.open_workers([make_job("prepro")]) as (workers, _):
        assert workers[0].tasks == ("files", "tokenizer")


def test_killed_worker_is_reported():
    with interleave.open_workers([make_job("prepro")]) as (workers, _):
        workers[0]._process.kill()
        with pytest.raises(MissingError, match="bench prepro: llmc failed: the process ended with status"):
            interleave.measure_interleaved(workers, "files", 1, 0, 0, ignore)


@pytest.fixture
def worker():
    """A WorkerProcess without a process."""
    worker = object.__new__(interleave.WorkerProcess)
    worker.peak_memory, worker.warnings = None, []
    worker._process = SimpleNamespace(stdin=io.StringIO())
    return worker


def test_repeated_warnings_are_kept_once(monkeypatch, worker):
    monkeypatch.setattr(worker, "_receive", lambda: {"seconds": 1.0, "peak_memory": None, "warnings": ["slow"]})
    for _ in range(2):
        worker.run("step")
    assert worker.warnings == ["slow"]


def test_peak_memory_is_the_maximum_of_all_runs(monkeypatch, worker):
    for memory, peak in ((None, None), (3, 3), (7, 7), (2, 7)):
        monkeypatch.setattr(worker, "_receive", lambda memory=memory: {"seconds": 1.0, "peak_memory": memory})
        worker.run("step")
        assert worker.peak_memory == peak


@pytest.mark.parametrize(
    ("device", "message", "has_advice"),
    [
        ("cuda:0", "OutOfMemoryError: CUDA out of memory.", True),
        ("cuda:0", "ValueError: no", False),
        ("cpu", "MemoryError: out of memory", False),
    ],
)
def test_out_of_memory_on_a_gpu_suggests_a_smaller_batch(device, message, has_advice):
    error = interleave.job_error(make_job("train", device=device), interleave.WorkerError(message))
    assert ("use a smaller --batch" in str(error)) == has_advice
