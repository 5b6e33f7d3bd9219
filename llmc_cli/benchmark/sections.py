"""Measures one section of ``bench``: its rows, with their shares of the ceilings, and optionally PyTorch's times."""

import dataclasses
import statistics

from llmc_cli.benchmark.ceilings import Ceilings
from llmc_cli.benchmark.interleave import Log, Measurement, WorkerProcess, measure_interleaved, open_workers
from llmc_cli.benchmark.job import Job
from llmc_cli.benchmark.results import Row, SectionResult, WorkerInfo, model_flops_utilization, share_of_ceiling
from llmc_cli.errors import MissingError
from llmc_cli.kernels.backend import sampling_precisions

WARMUP_ROUNDS = {"kernels": 1, "train": 2, "sample": 1, "prepro": 1}
WARMUP_RUNS = {"kernels": 1}  # before each timed run: the runs are short, and the other worker has evicted the caches
BREAKDOWN_RUNS = 2

TORCH_MODES = {"kernels": ("torch eager",), "train": ("torch eager", "torch compiled"),
               "sample": ("torch eager", "torch compiled", "transformers")}  # fmt: skip
CUDA_TORCH_MODES = {"sample": ("torch graphs",)}  # in addition, on a GPU, where llmc uses CUDA graphs too

TORCH_PRECISIONS = {"kernels": ("fp32", "tf32", "bf16"), "train": ("fp32", "tf32", "bf16"), "sample": ("fp32",)}
"""Precisions that PyTorch runs in too; it is compared in fp32 otherwise. On a GPU it samples in all of llmc's."""


def measure_section(
    job: Job, ceilings: Ceilings, against_torch: bool, log: Log, budget: float | None = None
) -> SectionResult:
    """Measure llmc's ``job`` in ``job.steps`` runs per row, interleaved with PyTorch if ``against_torch``.

    With a ``budget`` in seconds per row there are fewer runs if they are long. Raises MissingError if llmc cannot run
    the job, or if no PyTorch mode can.
    """
    section = job.section
    jobs = [job]
    if against_torch and section in TORCH_MODES:
        jobs += _torch_jobs(job)
    log(f"{section}: starting {', '.join(each.implementation for each in jobs)}")
    with open_workers(jobs) as (workers, unavailable):
        if unavailable and len(workers) == 1:
            raise MissingError(f"--against torch: {section}: {'; '.join(dict.fromkeys(unavailable.values()))}")
        llmc, others = workers[0], workers[1:]
        rows: list[Row] = []
        for task in llmc.tasks:
            if task == "split":
                continue
            selected = [llmc, *(other for other in others if task in other.tasks)]
            log(f"{section}: {task}")
            measurements = measure_interleaved(
                selected, task, job.steps, WARMUP_ROUNDS[section], _warmup_runs(job), log, budget
            )
            rows.append(_row(job, task, measurements, ceilings))
        if section == "prepro":
            rows = _relative_to_tokenizer(rows)
        for worker in workers:
            for text in worker.warnings:
                log(f"{section}: warning from {worker.implementation}: {text}")
            if worker.warnings:
                worker.configuration["warnings"] = "; ".join(worker.warnings)
        # read the peak memory before the breakdown, which allocates more
        infos = [WorkerInfo(section, each.implementation, each.configuration, each.peak_memory) for each in workers]
        if "split" in llmc.tasks:
            rows += _breakdown(llmc, rows[0], ceilings)
    return SectionResult(rows, infos, unavailable)


def _torch_jobs(job: Job) -> list[Job]:
    """Return a job for each PyTorch mode to compare with llmc's ``job``."""
    section, modes = job.section, TORCH_MODES[job.section]
    precision = job.precision if job.precision in TORCH_PRECISIONS[section] else "fp32"
    if _on_gpu(job):
        modes += CUDA_TORCH_MODES.get(section, ())
        if section == "sample":
            precision = " ".join(sampling_precisions(job.device, job.precision))
    return [dataclasses.replace(job, implementation=mode, precision=precision) for mode in modes]


def _warmup_runs(job: Job) -> int:
    """Untimed runs before each timed one: at least one on a GPU, where workers release cached memory between runs."""
    return max(WARMUP_RUNS.get(job.section, 0), int(_on_gpu(job)))


def _on_gpu(job: Job) -> bool:
    return job.device != "cpu" and job.section in TORCH_MODES


def _row(job: Job, task: str, measurements: dict[str, list[Measurement]], ceilings: Ceilings) -> Row:
    llmc, *others = measurements
    times = [measurement.seconds for measurement in measurements[llmc]]
    seconds, last = statistics.median(times), measurements[llmc][-1]
    tokens = {"train": job.batch * job.seq_len, "sample": job.batch}.get(job.section, 0)
    if job.section == "prepro":
        tokens = last.detail["tokens"]
    if job.section == "train":
        share, ceiling = model_flops_utilization(last.flops / seconds, ceilings)
    elif job.section == "prepro":
        share, ceiling = 0.0, ""
    elif job.section == "sample":  # reads every weight, writes almost nothing
        share, ceiling = last.bytes / seconds / ceilings.memory["read"], "read"
    else:
        share, ceiling = share_of_ceiling(last.flops / seconds, last.bytes / seconds, ceilings)
    return Row(
        name=f"{job.section}/{task}",
        seconds=seconds,
        best=min(times),
        runs=len(times),
        flops_per_s=last.flops / seconds,
        bytes_per_s=last.bytes / seconds,
        tokens_per_s=tokens / seconds,
        share=share,
        ceiling=ceiling,
        torch={mode: statistics.median(each.seconds for each in measurements[mode]) for mode in others},
        launches=last.detail["launches"] if job.section == "train" else 0,
    )


def _relative_to_tokenizer(rows: list[Row]) -> list[Row]:
    """Set the share of the ``files`` row to the part of its time that the tokenizer alone takes, a lower bound."""
    files, tokenizer = rows
    return [dataclasses.replace(files, share=tokenizer.seconds / files.seconds, ceiling="tokenizer"), tokenizer]


def _breakdown(llmc: WorkerProcess, step: Row, ceilings: Ceilings) -> list[Row]:
    """Measure the time of each operation in a training step: slowest first, then ``other`` for the rest."""
    measurements = [llmc.run("split") for _ in range(BREAKDOWN_RUNS)]
    rows = []
    for name, last in measurements[-1].detail.items():
        times = [measurement.detail[name]["seconds"] for measurement in measurements]
        seconds = statistics.median(times)
        flops_per_s, bytes_per_s = last["flops"] / seconds, last["bytes"] / seconds
        share, ceiling = share_of_ceiling(flops_per_s, bytes_per_s, ceilings)
        rows.append(
            Row(f"{step.name}/{name}", seconds, min(times), BREAKDOWN_RUNS, flops_per_s, bytes_per_s, 0.0, share,
                ceiling, last["calls"], launches=last["launches"])
        )  # fmt: skip
    rows.sort(key=lambda row: -row.seconds)
    rest = [each.seconds - sum(operation["seconds"] for operation in each.detail.values()) for each in measurements]
    return [*rows, Row(f"{step.name}/other", statistics.median(rest), min(rest), BREAKDOWN_RUNS)]
