"""Sides that take turns at the same work, each in a process of its own: only one computes at a time."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from llmc_cli.benchmark.job import Work
from llmc_cli.errors import LlmcError, MissingError
from llmc_cli.machine.idle_threads import users_environment

SETTLE_S = 0.02
"""Between one side's run and the next's: a thread pool that spins a while after its work would slow the other side."""

TELL_EVERY_S = 10.0

TAIL = 3  # lines of a failed process's stderr that are told

LONG_TURN_S = 30.0
"""A turn of all sides that took this long is the only one to warm up: most of it was work, not the start of it."""

LEAST_RUNS = 3  # however long they take


Note: TypeAlias = Callable[[str], None]
"""Hears what is under way."""


@dataclass(frozen=True)
class Answer:
    """One run. ``flops`` and ``bytes`` are 0 where the side does not say; ``peak_memory`` is the process's
    so far, on a GPU what it took of the GPU's since the run before. ``warnings``: given meanwhile."""

    seconds: float
    peak_memory: int | None
    flops: int = 0
    bytes: int = 0
    detail: Any = None
    warnings: Sequence[str] = ()


class Unavailable(Exception):
    """A side cannot take part, and why."""


class Contestant:
    """The process of one side. Raises ``Unavailable`` where it cannot do the work."""

    def __init__(self, work: Work) -> None:
        self.work, self.side = work, work.side
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 closed by close(); a pipe that nobody reads could fill
        self._process = subprocess.Popen(
            # -P: modules in the folder at hand, which may have any names, are none of ours
            [sys.executable, "-P", "-m", "llmc_cli.benchmark.worker", work.text()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=dict(os.environ) if work.side == "llmc" else users_environment(),
        )
        self.peak_memory: int | None = None
        self.warnings: list[str] = []
        try:
            ready = self._receive()
        except BaseException:
            self.close()
            raise
        self.tasks: tuple[str, ...] = tuple(ready["tasks"])
        self.configuration: dict[str, Any] = ready["configuration"]

    def ask(self, task: str, untimed: int = 0) -> Answer:
        """Have it run a task ``untimed`` times and once more, timed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said last tells why
            self._process.stdin.write(json.dumps({"task": task, "untimed": untimed}) + "\n")
            self._process.stdin.flush()
        answer = Answer(**self._receive())
        if answer.peak_memory is not None:
            self.peak_memory = max(answer.peak_memory, self.peak_memory or 0)
        self.warnings += [text for text in answer.warnings if text not in self.warnings]
        return answer

    def close(self) -> None:
        """End the process, at once."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().decode("utf-8", "replace").strip().splitlines()[-TAIL:]
            raise Unavailable(f"the process ended with status {status}: {' / '.join(said) or 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer


@contextlib.contextmanager
def contest(works: Sequence[Work]) -> Iterator[tuple[list[Contestant], dict[str, str]]]:
    """The contestants that can take part, the first of whom must, and for the others the reason why not."""
    with contextlib.ExitStack() as stack:
        contestants: list[Contestant] = []
        absent: dict[str, str] = {}
        for work in works:
            try:
                contestant = Contestant(work)
            except Unavailable as error:
                if work is works[0]:
                    raise failure(work, error) from None
                absent[work.side] = str(error)
                continue
            stack.callback(contestant.close)
            contestants.append(contestant)
        yield contestants, absent


def failure(work: Work, error: Unavailable) -> LlmcError:
    advice = ""
    if work.device != "cpu" and "out of memory" in str(error).lower():
        advice = "; all sides have their weights on the device at once: take a smaller --batch"
    return MissingError(f"bench {work.section}: {work.side} cannot do this: {error}{advice}")


def alternate(
    contestants: Sequence[Contestant],
    task: str,
    runs: int,
    warm_up: int,
    untimed: int,
    note: Note,
    budget: float | None = None,
) -> dict[str, list[Answer]]:
    """Per side its ``runs`` answers, in turns, after ``warm_up`` turns that do not count; fewer of both where turns are
    long: see ``LONG_TURN_S`` and ``fitting_runs``. Each run may be preceded by ``untimed`` ones, which bring back what
    the other side has used meanwhile, caches or a GPU's memory."""
    for done in range(1, warm_up + 1):
        start = time.monotonic()
        _turn(contestants, task, untimed)
        long = time.monotonic() - start
        if long >= LONG_TURN_S or done == warm_up:
            runs = fitting_runs(task, runs, long, note, budget)
            break
    turns: list[list[Answer]] = []
    last = time.monotonic()
    while len(turns) < runs:
        if time.monotonic() - last >= TELL_EVERY_S:
            last = time.monotonic()
            note(f"{task}: {len(turns)} of {runs} runs")
        turns.append(_turn(contestants, task, untimed))
    return {contestant.side: list(answers) for contestant, *answers in zip(contestants, *turns, strict=True)}


def fitting_runs(task: str, runs: int, long: float, note: Note, budget: float | None) -> int:
    """How many turns of ``long`` seconds to make: ``runs``, or with a budget as many as it has time for, but not less
    than ``LEAST_RUNS``. Where that takes a while it is told."""
    fitting = runs if budget is None else min(runs, max(LEAST_RUNS, int(budget / max(long, 1e-9))))
    if fitting < runs:
        note(f"{task}: a turn takes {long:.0f} s: {fitting} runs instead of {runs}, about {fitting * long:.0f} s")
    elif fitting * long >= TELL_EVERY_S:
        note(f"{task}: {fitting} runs, about {fitting * long:.0f} s")
    return fitting


def _turn(contestants: Sequence[Contestant], task: str, untimed: int) -> list[Answer]:
    """The answer of each contestant, one after the other."""
    answers = []
    for contestant in contestants:
        if len(contestants) > 1:
            time.sleep(SETTLE_S)
        try:
            answers.append(contestant.ask(task, untimed))
        except Unavailable as error:
            raise failure(contestant.work, error) from None
    return answers
