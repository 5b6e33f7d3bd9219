"""Benchmark worker: a process that runs the tasks of one job on request.

Started as ``python -P -m llmc_cli.benchmark.worker JOB``, where JOB is the output of ``Job.to_json``. The worker writes
one line of JSON with its tasks and configuration to stdout. After that each line on stdin, such as ``{"task": "step",
"warmup_runs": 0}``, is a request; the measurement is written to stdout as one line.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from llmc_cli.benchmark.job import Job
from llmc_cli.errors import LlmcError
from llmc_cli.machine.idle_threads import set_passive_wait, set_spin_wait
from llmc_cli.machine.memory import peak_memory

if TYPE_CHECKING:
    from llmc_cli.benchmark.workloads import Task, Workload
    from llmc_cli.kernels.spec import Kernels


class Memory(NamedTuple):
    """Access to the memory of the GPU, or of this process on the CPU.

    ``peak``: bytes used at most. ``release``: free cached blocks for the other workers on the same GPU.
    """

    peak: Callable[[], int | None]
    release: Callable[[], None]


PROCESS_MEMORY = Memory(peak_memory, lambda: None)


def open_llmc(job: Job) -> "tuple[Workload, dict[str, Any], Memory]":
    """Return llmc's workload for ``job``, its configuration and its memory."""
    from llmc_cli.benchmark import workloads
    from llmc_cli.kernels.backend import open_kernels, open_sampling, sampling_precisions

    config, B, T = job.config, job.batch, job.seq_len
    if job.section == "prepro":
        return workloads.PreproWorkload(), {"workers": 1}, PROCESS_MEMORY
    if job.section == "sample":
        precisions = sampling_precisions(job.device, job.precision)
        backends = {precision: open_sampling(job.device, precision, job.threads) for precision in precisions}
        kernels = {precision: backend.kernels for precision, backend in backends.items()}
        first = next(iter(backends.values()))
        configuration = {"device": first.device, "threads": first.threads, "precision": " ".join(backends),
                         "on": "; ".join(backend.description for backend in backends.values())}  # fmt: skip
        return workloads.SampleWorkload(kernels, config, B, T), configuration, _kernels_memory(first.kernels)
    backend = open_kernels(job.device, job.precision, job.threads)
    configuration = {"device": backend.device, "precision": backend.precision, "threads": backend.threads,
                     "on": backend.description}  # fmt: skip
    workload: Workload
    if job.section == "train":
        configuration["recompute"] = job.recompute
        workload = workloads.TrainWorkload(backend.kernels, config, B, T, job.recompute)
    else:
        workload = workloads.KernelsWorkload(backend.kernels, config, B, T)
    return workload, configuration, _kernels_memory(backend.kernels)


def _kernels_memory(kernels: "Kernels") -> Memory:
    return Memory(kernels.held_bytes, kernels.release_memory) if kernels.device_name else PROCESS_MEMORY


def open_torch(job: Job) -> "tuple[Workload, dict[str, Any], Memory]":
    """Return PyTorch's workload for ``job``, its configuration and its memory."""
    from llmc_cli.benchmark import torch_workloads

    workload, configuration = torch_workloads.open_torch(job)
    if torch_workloads.is_cuda(job.device):
        return workload, configuration, Memory(torch_workloads.reserved_memory, torch_workloads.release)
    return workload, configuration, PROCESS_MEMORY


class TaskRunner:
    """Runs the tasks of a workload. The task prepared last is cached."""

    def __init__(self, workload: "Workload", memory: Memory = PROCESS_MEMORY) -> None:
        self.workload, self.memory = workload, memory
        self.name: str | None = None
        self.task: Task | None = None

    def run(self, name: str, warmup_runs: int) -> dict[str, Any]:
        """Run a task ``warmup_runs`` times untimed, then once timed. Return the fields of a ``Measurement``.

        Python warnings are returned too, because stderr is only shown if the process fails.
        """
        with warnings.catch_warnings(record=True) as caught:
            if name != self.name or self.task is None:
                self.task = self.name = None  # free its memory before the next task allocates
                self.task = self.workload.prepare(name)
                self.name = name
            for _ in range(warmup_runs):
                self.task.run()
            start = time.perf_counter()
            detail = self.task.run()
            seconds = (time.perf_counter() - start) / self.task.parts
        peak = self.memory.peak()
        self.memory.release()
        return {"seconds": seconds, "flops": self.task.cost.flops, "bytes": self.task.cost.bytes, "detail": detail,
                "peak_memory": peak, "warnings": [first_line(warning.message) for warning in caught]}  # fmt: skip


def serve(job: Job, requests: TextIO, reply: Callable[[dict[str, Any]], None]) -> None:
    """Open the workload and reply to each request until ``requests`` ends.

    An error is sent as a reply ``{"error": ...}`` and ends the loop.
    """
    try:
        workload, configuration, memory = (open_llmc if job.implementation == "llmc" else open_torch)(job)
        memory.release()
        reply({"tasks": workload.tasks, "configuration": configuration})
        runner = TaskRunner(workload, memory)
        for line in requests:
            request = json.loads(line)
            reply(runner.run(request["task"], request["warmup_runs"]))
    except LlmcError as error:
        reply({"error": str(error)})
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {first_line(error)}"})


def first_line(message: Exception | str) -> str:
    first, *_ = str(message).strip().splitlines() or [""]
    return first


def main() -> None:
    job = Job.from_json(sys.argv[1])
    if job.implementation == "llmc":
        set_passive_wait()
        if job.section == "sample":
            set_spin_wait()
    # reserve the stdout pipe for replies; anything a library prints to stdout goes to stderr
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def reply(content: dict[str, Any]) -> None:
            replies.write(json.dumps(content) + "\n")
            replies.flush()

        serve(job, sys.stdin, reply)


if __name__ == "__main__":
    main()
