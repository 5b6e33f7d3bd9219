"""Processes that take turns."""

import io
import os
import warnings
from types import SimpleNamespace

import pytest
from support.benchmark_inputs import quiet, work

from llmc_cli.benchmark import interleave
from llmc_cli.benchmark.job import Work
from llmc_cli.benchmark.worker import Desk, Memory
from llmc_cli.benchmark.workloads import Task
from llmc_cli.errors import MissingError
from llmc_cli.machine.idle_threads import PASSIVE, users_environment, wait_passively
from llmc_cli.machine.memory import peak_memory


def test_work_survives_the_command_line():
    assert Work.from_text(work("train").text()) == work("train")


def test_peak_memory_is_this_processs():
    peak = peak_memory()
    assert peak is None or 10e6 < peak < 1e12


def test_our_settings_are_kept_from_others_and_the_users_are_not(monkeypatch):
    name, other = PASSIVE
    monkeypatch.setattr("llmc_cli.machine.idle_threads._set_here", set())
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(other, "the user's")
    wait_passively()
    assert os.environ[name] == PASSIVE[name]
    assert name not in users_environment()
    assert users_environment()[other] == "the user's"


def test_turns_alternate_and_warm_up_does_not_count(monkeypatch):
    order = []

    class Fake:
        def __init__(self, side, seconds):
            self.side, self.seconds = side, iter(seconds)

        def ask(self, task, untimed):
            order.append((self.side, task, untimed))
            return interleave.Answer(next(self.seconds), 0)

    monkeypatch.setattr(interleave, "SETTLE_S", 0)
    monkeypatch.setattr(interleave, "TELL_EVERY_S", 0)
    said = []
    answers = interleave.alternate([Fake("a", [9, 1, 2]), Fake("b", [9, 3, 4])], "step", 2, 1, 1, said.append)
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
        return interleave.Answer(self.seconds, 0)


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
    monkeypatch.setattr(interleave.time, "monotonic", lambda: clock[0])
    side = Slow(clock, seconds)
    (answers,) = interleave.alternate([side], "step", 10, 2, 0, said.append, budget).values()
    assert (side.asked, len(answers)) == (warm_up + runs, runs)
    whole = f"about {runs * seconds:.0f} s"
    assert any(whole in text for text in said) == (runs * seconds >= interleave.TELL_EVERY_S)
    assert any("instead of 10" in text for text in said) == (runs < 10)


def test_a_side_that_cannot_is_an_error_for_us_and_an_absence_for_others(monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with interleave.contest([work("sample"), work("sample", side="torch eager")]) as (contestants, absent):
        assert [contestant.side for contestant in contestants] == ["llmc"]
    assert absent == {"torch eager": "ImportError: broken on purpose"}
    with (
        pytest.raises(MissingError, match=r"bench sample: llmc cannot do this: --device cuda"),
        interleave.contest([work("sample", device="cuda:99")]),
    ):
        pass


def test_modules_in_the_folder_at_hand_are_not_taken_for_others(monkeypatch, tmp_path):
    (tmp_path / "json.py").write_text("raise ImportError('somebody else')\n")
    monkeypatch.chdir(tmp_path)
    with interleave.contest([work("prepro")]) as (contestants, _):
        assert contestants[0].tasks == ("files", "tokenizer")


def test_a_process_that_dies_is_told_of():
    with interleave.contest([work("prepro")]) as (contestants, _):
        contestants[0]._process.kill()
        with pytest.raises(MissingError, match="bench prepro: llmc cannot do this: the process ended with status"):
            interleave.alternate(contestants, "files", 1, 0, 0, quiet)


def test_memory_is_given_back_between_turns():
    """After the time and what was held are taken, so that it is neither."""
    order = []

    class Workload:
        tasks = ("step",)

        def prepare(self, task):
            return Task(lambda: order.append("run"))

    def held():
        order.append("held")
        return 5

    desk = Desk(Workload(), Memory(held, lambda: order.append("release")))
    assert desk.answer("step", 1)["peak_memory"] == 5
    assert desk.answer("step", 0)["peak_memory"] == 5
    assert order == ["run", "run", "held", "release", "run", "held", "release"]


@pytest.mark.filterwarnings("default")
def test_warnings_are_answered(monkeypatch):
    """By their first lines, each told once."""

    class Workload:
        tasks = ("step",)

        def prepare(self, task):
            return Task(lambda: warnings.warn("slow\nas can be", stacklevel=1))

    answer = Desk(Workload()).answer("step", 0)
    assert answer["warnings"] == ["slow"]
    side = object.__new__(interleave.Contestant)
    side.peak_memory, side.warnings = None, []
    side._process = SimpleNamespace(stdin=io.StringIO())
    monkeypatch.setattr(side, "_receive", lambda: answer)
    for _ in range(2):
        side.ask("step")
    assert side.warnings == ["slow"]


def test_the_most_that_was_held_counts(monkeypatch):
    side = object.__new__(interleave.Contestant)
    side.peak_memory, side.warnings = None, []
    side._process = SimpleNamespace(stdin=io.StringIO())
    for held, most in ((None, None), (3, 3), (7, 7), (2, 7)):
        monkeypatch.setattr(side, "_receive", lambda held=held: {"seconds": 1.0, "peak_memory": held})
        side.ask("step")
        assert side.peak_memory == most


@pytest.mark.parametrize(
    ("device", "said", "advice"),
    [
        ("cuda:0", "OutOfMemoryError: CUDA out of memory.", True),
        ("cuda:0", "ValueError: no", False),
        ("cpu", "MemoryError: out of memory", False),
    ],
)
def test_too_large_a_batch_for_a_device(device, said, advice):
    error = interleave.failure(work("train", device=device), interleave.Unavailable(said))
    assert ("take a smaller --batch" in str(error)) == advice
