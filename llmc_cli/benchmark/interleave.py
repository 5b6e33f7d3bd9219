"""Interleaved A/B benchmark: one worker process per implementation, only one of them running at a time."""

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

from llmc_cli.benchmark.job import Job
from llmc_cli.errors import LlmcError, MissingError
from llmc_cli.machine.idle_threads import user_environment

PAUSE_S = 0.02
"""Pause before each run: the previous worker's thread pool may keep spinning briefly after its run."""

PROGRESS_INTERVAL_S = 10.0

STDERR_LINES = 3  # last lines of a failed process's stderr, quoted in the error

LONG_ROUND_S = 30.0
"""After a warm-up round of at least this length no further warm-up rounds are run."""

MIN_RUNS = 3  # whatever the time budget


Log: TypeAlias = Callable[[str], None]
"""Called with progress messages."""


@dataclass(frozen=True)
class Measurement:
    """One timed run.

    ``flops``, ``bytes``: 0 if the worker does not report them. ``peak_memory``: of the process so far, or on a GPU the
    memory allocated since the previous run. ``warnings``: raised during the run.
    """

    seconds: float
    peak_memory: int | None
    flops: int = 0
    bytes: int = 0
    detail: Any = None
    warnings: Sequence[str] = ()


class WorkerError(Exception):
    """A worker process could not start or failed."""


class WorkerProcess:
    """A subprocess that runs the tasks of one job. Raises ``WorkerError`` if the job fails."""

    def __init__(self, job: Job) -> None:
        self.job, self.implementation = job, job.implementation
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 closed by close(); an unread pipe could fill up
        self._process = subprocess.Popen(
            # -P: do not import modules from the working directory
            [sys.executable, "-P", "-m", "llmc_cli.benchmark.worker", job.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            encoding="utf-8",
            env=dict(os.environ) if job.implementation == "llmc" else user_environment(),
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

    def run(self, task: str, warmup_runs: int = 0) -> Measurement:
        """Run ``task`` ``warmup_runs`` times untimed, then once timed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended; _receive() reports why
            self._process.stdin.write(json.dumps({"task": task, "warmup_runs": warmup_runs}) + "\n")
            self._process.stdin.flush()
        measurement = Measurement(**self._receive())
        if measurement.peak_memory is not None:
            self.peak_memory = max(measurement.peak_memory, self.peak_memory or 0)
        self.warnings += [text for text in measurement.warnings if text not in self.warnings]
        return measurement

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._stderr.seek(0)
            lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()[-STDERR_LINES:]
            raise WorkerError(f"the process ended with status {status}: {' / '.join(lines) or 'no error message'}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply


@contextlib.contextmanager
def open_workers(jobs: Sequence[Job]) -> Iterator[tuple[list[WorkerProcess], dict[str, str]]]:
    """Start a worker per job. Yield the workers that started, and the reason for each implementation that did not.

    The first job must start: otherwise raises MissingError.
    """
    with contextlib.ExitStack() as stack:
        workers: list[WorkerProcess] = []
        unavailable: dict[str, str] = {}
        for job in jobs:
            try:
                worker = WorkerProcess(job)
            except WorkerError as error:
                if job is jobs[0]:
                    raise job_error(job, error) from None
                unavailable[job.implementation] = str(error)
                continue
            stack.callback(worker.close)
            workers.append(worker)
        yield workers, unavailable


def job_error(job: Job, error: WorkerError) -> LlmcError:
    """Return the error to raise if ``job`` failed with ``error``."""
    advice = ""
    if job.device != "cpu" and "out of memory" in str(error).lower():
        advice = "; the weights of all implementations are on the device at once: use a smaller --batch"
    return MissingError(f"bench {job.section}: {job.implementation} failed: {error}{advice}")


def measure_interleaved(
    workers: Sequence[WorkerProcess],
    task: str,
    runs: int,
    warmup_rounds: int,
    warmup_runs: int,
    log: Log,
    budget: float | None = None,
) -> dict[str, list[Measurement]]:
    """Return ``runs`` measurements per implementation. In each round every worker runs the task once.

    ``warmup_rounds`` untimed rounds come first; only one if it takes ``LONG_ROUND_S``. Within a round each timed run
    follows ``warmup_runs`` untimed ones, which refill the caches or the GPU memory that another worker has used. With a
    ``budget`` in seconds there are fewer runs if rounds are long (see ``runs_within_budget``).
    """
    for done in range(1, warmup_rounds + 1):
        start = time.monotonic()
        _run_round(workers, task, warmup_runs)
        round_seconds = time.monotonic() - start
        if round_seconds >= LONG_ROUND_S or done == warmup_rounds:
            runs = runs_within_budget(task, runs, round_seconds, log, budget)
            break
    rounds: list[list[Measurement]] = []
    last = time.monotonic()
    while len(rounds) < runs:
        if time.monotonic() - last >= PROGRESS_INTERVAL_S:
            last = time.monotonic()
            log(f"{task}: {len(rounds)} of {runs} runs")
        rounds.append(_run_round(workers, task, warmup_runs))
    return {worker.implementation: list(found) for worker, *found in zip(workers, *rounds, strict=True)}


def runs_within_budget(task: str, runs: int, round_seconds: float, log: Log, budget: float | None) -> int:
    """Return ``runs``, reduced to the rounds that fit into ``budget`` seconds but not below ``MIN_RUNS``.

    Logs the expected time if the number was reduced or the time is long.
    """
    count = runs if budget is None else min(runs, max(MIN_RUNS, int(budget / max(round_seconds, 1e-9))))
    total = count * round_seconds
    if count < runs:
        log(f"{task}: a round takes {round_seconds:.0f} s: {count} runs instead of {runs}, about {total:.0f} s")
    elif total >= PROGRESS_INTERVAL_S:
        log(f"{task}: {count} runs, about {total:.0f} s")
    return count


def _run_round(workers: Sequence[WorkerProcess], task: str, warmup_runs: int) -> list[Measurement]:
    """Run the task once on each worker, one worker after another."""
    measurements = []
    for worker in workers:
        if len(workers) > 1:
            time.sleep(PAUSE_S)
        try:
            measurements.append(worker.run(task, warmup_runs))
        except WorkerError as error:
            raise job_error(worker.job, error) from None
    return measurements
