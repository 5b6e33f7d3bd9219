"""The benchmark: checks the options, measures every section and collects the results in one document."""

import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmc_cli.benchmark.baseline import SCHEMA, Change, read_baseline, this_machine
from llmc_cli.benchmark.ceilings import Ceilings, measure_ceilings
from llmc_cli.benchmark.interleave import Log
from llmc_cli.benchmark.job import Job
from llmc_cli.benchmark.results import Row, SectionResult, WorkerInfo
from llmc_cli.benchmark.sections import TORCH_MODES, measure_section
from llmc_cli.benchmark.startup import measure_startup
from llmc_cli.errors import MissingError, UsageError
from llmc_cli.formats.atomic import atomic_write
from llmc_cli.kernels.backend import Backend, open_kernels, open_sampling
from llmc_cli.machine.cores import available_cores
from llmc_cli.models.files import resolve_config

SECTIONS = ("kernels", "train", "sample", "prepro", "start")
DEFAULT_BATCH = {"kernels": 4, "train": 4, "sample": 1, "prepro": 1, "start": 4}
DEFAULT_RUNS = {"kernels": 20, "train": 10, "sample": 10, "prepro": 3, "start": 3}  # timed runs per row
BUDGET_S = 120.0  # per row, unless the number of runs is given
PACKAGES = ("llmc-cli", "numpy", "numba", "scipy", "tiktoken", "torch", "cupy-cuda12x", "cupy-cuda13x")
BUSY_LOAD = 0.25  # per core: above this, other programs disturb the measurement


@dataclass(frozen=True)
class BenchOptions:
    """The options of ``llmc bench``. None selects the default of each section."""

    sections: tuple[str, ...] = SECTIONS
    model: str = "d12"
    batch: int | None = None
    seq_len: int = 64
    steps: int | None = None
    against_torch: bool = False
    baseline: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    threads: int | None = None
    recompute: int = 2
    peak_tflops: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """The results of one ``llmc bench``.

    ``settings``: model, device, precision, threads and the shape of each section; with ``machine`` they must match for
    a comparison. ``load``: load average of the minute before. ``compile_seconds``: time to compile the kernels, None if
    they were cached. ``unavailable``: per section, the PyTorch modes that could not run, with the reason. ``changes``:
    compared with the baseline, if one was given.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    ceilings: Ceilings
    load: float | None
    compile_seconds: float | None
    rows: list[Row]
    workers: list[WorkerInfo]
    unavailable: dict[str, dict[str, str]]
    changes: list[Change]

    @property
    def precision_differences(self) -> dict[str, tuple[str, str]]:
        """The precisions of llmc and PyTorch, for each section in which they differ."""
        precisions = [
            (each.section, each.implementation == "llmc", each.configuration.get("precision", ""))
            for each in self.workers
        ]
        llmc = {section: precision for section, is_llmc, precision in precisions if is_llmc}
        torch = {section: precision for section, is_llmc, precision in precisions if not is_llmc}
        return {section: (llmc[section], each) for section, each in torch.items() if each != llmc[section]}

    def document(self) -> dict[str, Any]:
        """Return the results, with derived values, as the content of a JSON document."""
        return {
            "schema": SCHEMA,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings,
            "load": self.load,
            "compile_seconds": self.compile_seconds,
            "sides": [
                {
                    "section": worker.section,
                    "side": worker.implementation,
                    "configuration": worker.configuration,
                    "peak_memory": worker.peak_memory,
                }
                for worker in self.workers
            ],
            "absent": self.unavailable,
            "ceilings": {
                "flops_per_s": self.ceilings.flops,
                "bytes_per_s": self.ceilings.bandwidth,
                **dataclasses.asdict(self.ceilings),
            },
            "rows": [
                {**dataclasses.asdict(row), "ratios": row.ratios, "best_mode": row.best_mode} for row in self.rows
            ],
            "changes": [{**dataclasses.asdict(change), "slowdown": change.slowdown} for change in self.changes],
        }

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.write(json.dumps(self.document(), indent=1).encode() + b"\n")


def run_benchmark(options: BenchOptions, log: Log) -> Benchmark:
    """Check the options, then measure. ``log`` is called with progress messages.

    Raises UsageError or MissingError for options that cannot be satisfied, before anything is measured.
    """
    jobs = _llmc_jobs(options)
    _check_peak(options)
    if options.against_torch:
        _require_torch(options.sections)
    baseline = read_baseline(options.baseline) if options.baseline else None
    load = _load_average(available_cores(), log)
    backend, compile_seconds = _open_backend(options, log)
    machine, settings = this_machine() | _gpu_name(backend), _settings(options, jobs, backend)
    if baseline:
        baseline.check(machine, settings)
    log("measuring ceilings")
    ceilings = measure_ceilings(backend)
    if options.peak_tflops is not None:
        ceilings = dataclasses.replace(ceilings, published=1e12 * options.peak_tflops)
    budget = BUDGET_S if options.steps is None else None
    results: dict[str, SectionResult] = {}
    for job in jobs:
        # replace "auto" by what it resolved to, so that every process uses the same
        job = dataclasses.replace(job, device=backend.device)
        if job.section != "sample":  # where "auto" means all precisions
            job = dataclasses.replace(job, precision=backend.precision)
        results[job.section] = (
            measure_startup(job, options.model, log)
            if job.section == "start"
            else measure_section(job, ceilings, options.against_torch, log, budget)
        )
    rows = [row for result in results.values() for row in result.rows]
    return Benchmark(
        machine=machine,
        versions=_versions(),
        settings=settings,
        ceilings=ceilings,
        load=load,
        compile_seconds=compile_seconds,
        rows=rows,
        workers=[worker for result in results.values() for worker in result.workers],
        unavailable={section: result.unavailable for section, result in results.items() if result.unavailable},
        changes=baseline.changes(rows) if baseline else [],
    )


def _llmc_jobs(options: BenchOptions) -> list[Job]:
    """Return llmc's job for each section. Raises UsageError if the model's context is too short."""
    config, T = resolve_config(options.model), options.seq_len
    if T > config.max_seq_len:
        raise UsageError(f"--seq-len {T}: expected at most {config.max_seq_len}, the context length of {options.model}")
    if T == config.max_seq_len and "sample" in options.sections:
        raise UsageError(
            f"--seq-len {T}: expected less than {config.max_seq_len}, the context length of {options.model}, "
            "to leave room for sampling"
        )
    return [
        Job(
            implementation="llmc",
            section=section,
            config=config,
            batch=options.batch or DEFAULT_BATCH[section],
            seq_len=T,
            steps=options.steps or DEFAULT_RUNS[section],
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            recompute=options.recompute,
        )
        for section in options.sections
    ]


def _check_peak(options: BenchOptions) -> None:
    """Raise UsageError if ``--peak-tflops`` is not a positive number, or has no effect."""
    peak = options.peak_tflops
    if peak is None:
        return
    if not (math.isfinite(peak) and peak > 0):
        raise UsageError(f"--peak-tflops {peak:g}: expected a number above 0")
    if "train" not in options.sections:
        raise UsageError(f"--peak-tflops applies to train only, and has no effect on {', '.join(options.sections)}")


def _gpu_name(backend: Backend) -> dict[str, str]:
    """Return the GPU's name; empty on the CPU."""
    name = backend.kernels.device_name
    return {"card": name} if name else {}


def _require_torch(sections: tuple[str, ...]) -> None:
    """Raise UsageError if PyTorch has no equivalent of ``sections``, and MissingError if it is not installed."""
    if not set(sections) & set(TORCH_MODES):
        raise UsageError(
            f"--against torch: no PyTorch equivalent of {', '.join(sections)}; expected {', '.join(TORCH_MODES)}"
        )
    if importlib.util.find_spec("torch") is None:
        raise MissingError("--against torch: PyTorch is not installed; run pip install 'llmc-cli[witness]'")


def _load_average(cores: int, log: Log) -> float | None:
    """Return the load average of the last minute, None where it is unknown. A high load is logged."""
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    load = os.getloadavg()[0]
    if load > BUSY_LOAD * cores:
        log(f"this machine is busy (load average {load:.1f} on {cores} cores): the times will be unreliable")
    return load


def _open_backend(options: BenchOptions, log: Log) -> tuple[Backend, float | None]:
    """Return the backend, and the seconds it took if kernels had to be compiled, else None."""
    messages: list[str] = []

    def on_compile(text: str) -> None:
        messages.append(text)
        log(text)

    start = time.perf_counter()
    if options.sections == ("sample",):
        backend = open_sampling(options.device, options.precision, options.threads, on_compile)
    else:
        backend = open_kernels(options.device, options.precision, options.threads, on_compile, True)
        if "sample" in options.sections:
            open_sampling(options.device, "auto", options.threads, on_compile)
    return backend, time.perf_counter() - start if messages else None


def _settings(options: BenchOptions, jobs: list[Job], backend: Backend) -> dict[str, Any]:
    return {
        "model": options.model,
        "config": dataclasses.asdict(jobs[0].config),
        "device": backend.device,
        "precision": backend.precision,
        "threads": backend.threads,
        "sections": {job.section: _section_settings(job) for job in jobs},
    }


def _section_settings(job: Job) -> dict[str, int]:
    settings = {"batch": job.batch, "seq_len": job.seq_len}
    return {**settings, "recompute": job.recompute} if job.section in ("train", "start") else settings


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that affect speed."""
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
