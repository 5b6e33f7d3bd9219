"""One side of a contest: a process that does a piece of work each time it is asked, and sleeps in between.

It is started as ``python -P -m llmc_cli.contestant WORK``, WORK being JSON as ``Work.text`` makes it. A line of JSON on
stdin, ``{"task": "step", "untimed": 0}``, is answered by one on stdout; the first line out says that it is ready. To
run it alone, pipe such lines in.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from llmc_cli.benchmark.job import Work
from llmc_cli.errors import LlmcError
from llmc_cli.machine.idle_threads import spin_between_calls, wait_passively
from llmc_cli.machine.memory import peak_memory

if TYPE_CHECKING:
    from llmc_cli.benchmark.workloads import Task, Workload


class Memory(NamedTuple):
    """Of a GPU where that computes, else of this process. ``held``: bytes that are, or were at most; ``release``: let
    the other sides have what is not in use, as all of them are on one GPU."""

    held: Callable[[], int | None]
    release: Callable[[], None]


OF_THE_PROCESS = Memory(peak_memory, lambda: None)


def our_side(work: Work) -> "tuple[Workload, dict[str, Any], Memory]":
    """Our work, and what it runs on."""
    from llmc_cli.benchmark import workloads
    from llmc_cli.kernels.backend import open_kernels, open_sampling, sampling_precisions

    config, B, T = work.config, work.batch, work.seq_len
    if work.section == "prepro":
        return workloads.PreproWorkload(), {"workers": 1}, OF_THE_PROCESS
    if work.section == "sample":
        precisions = sampling_precisions(work.device, work.precision)
        opened = {each: open_sampling(work.device, each, work.threads) for each in precisions}
        kernels = {each: backend.kernels for each, backend in opened.items()}
        first = next(iter(opened.values()))
        configuration = {"device": first.device, "threads": first.threads, "precision": " ".join(opened),
                         "on": "; ".join(each.description for each in opened.values())}  # fmt: skip
        return workloads.SampleWorkload(kernels, config, B, T), configuration, _memory(first.kernels)
    backend = open_kernels(work.device, work.precision, work.threads)
    configuration = {"device": backend.device, "precision": backend.precision, "threads": backend.threads,
                     "on": backend.description}  # fmt: skip
    made: Workload
    if work.section == "train":
        configuration["recompute"] = work.recompute
        made = workloads.TrainWorkload(backend.kernels, config, B, T, work.recompute)
    else:
        made = workloads.KernelsWorkload(backend.kernels, config, B, T)
    return made, configuration, _memory(backend.kernels)


def _memory(kernels: Any) -> Memory:
    return Memory(kernels.held_bytes, kernels.release_memory) if kernels.device_name else OF_THE_PROCESS


def torch_side(work: Work) -> "tuple[Workload, dict[str, Any], Memory]":
    from llmc_cli.benchmark import torch_workloads as theirs

    made, configuration = theirs.open_torch(work)
    on_gpu = theirs.is_cuda(work.device)
    return made, configuration, Memory(theirs.reserved_memory, theirs.release) if on_gpu else OF_THE_PROCESS


class Desk:
    """Takes requests and answers them; keeps the task at hand prepared."""

    def __init__(self, workload: "Workload", memory: Memory = OF_THE_PROCESS) -> None:
        self.workload, self.memory = workload, memory
        self.name: str | None = None
        self.task: Task | None = None

    def answer(self, name: str, untimed: int) -> dict[str, Any]:
        """Run a task ``untimed`` times and once more, timed. Warnings are part of the answer: stderr is read only where
        the process fails."""
        with warnings.catch_warnings(record=True) as heard:
            if name != self.name or self.task is None:
                self.task = self.name = None  # frees its memory before the next task takes its own
                self.task = self.workload.prepare(name)
                self.name = name
            for _ in range(untimed):
                self.task.run()
            start = time.perf_counter()
            detail = self.task.run()
            seconds = (time.perf_counter() - start) / self.task.parts
        held = self.memory.held()
        self.memory.release()
        return {"seconds": seconds, "flops": self.task.cost.flops, "bytes": self.task.cost.bytes, "detail": detail,
                "peak_memory": held, "warnings": [first_line(each.message) for each in heard]}  # fmt: skip


def serve(work: Work, requests: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Make the workload, say so, and answer requests until there are no more.

    An error is an answer too, the last one.
    """
    try:
        workload, configuration, memory = (our_side if work.side == "llmc" else torch_side)(work)
        memory.release()
        answer({"tasks": workload.tasks, "configuration": configuration})
        desk = Desk(workload, memory)
        for line in requests:
            request = json.loads(line)
            answer(desk.answer(request["task"], request.get("untimed", 0)))
    except LlmcError as error:
        answer({"error": str(error)})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {first_line(error)}"})


def first_line(message: Exception | str) -> str:
    first, *_ = str(message).strip().splitlines() or [""]
    return first


def main() -> None:
    work = Work.from_text(sys.argv[1])
    if work.side == "llmc":
        wait_passively()
        if work.section == "sample":
            spin_between_calls()
    # what a library may print to stdout goes to stderr: answers have their pipe to themselves
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def answer(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        serve(work, sys.stdin, answer)


if __name__ == "__main__":
    main()
