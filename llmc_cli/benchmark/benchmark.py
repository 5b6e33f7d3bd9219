"""``bench`` as a whole: what is to be measured, measuring it, and the results as a document."""

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
from llmc_cli.benchmark.interleave import Note
from llmc_cli.benchmark.job import Work
from llmc_cli.benchmark.results import Measured, Row, Side
from llmc_cli.benchmark.sections import measure
from llmc_cli.benchmark.startup import measure_start
from llmc_cli.errors import MissingError, UsageError
from llmc_cli.formats.atomic import atomic_write
from llmc_cli.kernels.backend import Backend, open_kernels, open_sampling
from llmc_cli.machine.cores import available_cores
from llmc_cli.models.files import resolve_config

SECTIONS = ("kernels", "train", "sample", "prepro", "start")
AGAINST_TORCH = ("kernels", "train", "sample")
BATCH = {"kernels": 4, "train": 4, "sample": 1, "prepro": 1, "start": 4}
RUNS = {"kernels": 20, "train": 10, "sample": 10, "prepro": 3, "start": 3}  # timed, of each row, unless told otherwise
BUDGET_S = 120.0  # for a row, unless the number of runs is given
PACKAGES = ("llmc-cli", "numpy", "numba", "scipy", "tiktoken", "torch", "cupy-cuda12x", "cupy-cuda13x")
BUSY = 0.25  # of the cores: work of others that disturbs
COMPUTED = ("ceilings", "rows", "changes")  # fields that a document shows with what follows from them


@dataclass(frozen=True)
class BenchOptions:
    """The options of ``llmc bench``, named as there; None takes a section's own default."""

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
    """All of one call of ``bench``.

    ``settings``: what a comparison requires to be the same beside the machine: model, shape, device, precision, threads
    and per section its batch, length and level of recomputing. ``load``: busy cores in the minute before.
    ``compile_seconds``: how long opening the kernels took where they had to be compiled, None where they came from the
    cache. ``absent``: per section the modes of PyTorch that could not take part, and why. ``changes``: against the
    baseline, where one was given.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    ceilings: Ceilings
    load: float | None
    compile_seconds: float | None
    rows: list[Row]
    sides: list[Side]
    absent: dict[str, dict[str, str]]
    changes: list[Change]

    @property
    def other_precisions(self) -> dict[str, tuple[str, str]]:
        """Per section the precision of our side and that of PyTorch's sides, where these differ."""
        sides = [(side.section, side.side == "llmc", side.configuration.get("precision", "")) for side in self.sides]
        ours = {section: precision for section, is_ours, precision in sides if is_ours}
        theirs = {section: precision for section, is_ours, precision in sides if not is_ours}
        return {section: (ours[section], each) for section, each in theirs.items() if each != ours[section]}

    def document(self) -> dict[str, Any]:
        """As JSON has it, with what follows from the figures beside them."""
        content = {key: value for key, value in dataclasses.asdict(self).items() if key not in COMPUTED}
        ceilings = {"flops_per_s": self.ceilings.flops, "bytes_per_s": self.ceilings.bandwidth}
        return {
            "schema": SCHEMA,
            **content,
            "ceilings": {**ceilings, **dataclasses.asdict(self.ceilings)},
            "rows": [
                {**dataclasses.asdict(row), "ratios": row.ratios, "best_mode": row.best_mode} for row in self.rows
            ],
            "changes": [{**dataclasses.asdict(change), "slowdown": change.slowdown} for change in self.changes],
        }

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            file.write(json.dumps(self.document(), indent=1).encode() + b"\n")


def run(options: BenchOptions, note: Note) -> Benchmark:
    """Measure; ``note`` hears what is under way. Whatever can be refused is refused before anything is measured."""
    works = _works(options)
    _check_peak(options)
    if options.against_torch:
        _require_torch(options.sections)
    earlier = read_baseline(options.baseline) if options.baseline else None
    load = _load(available_cores(), note)
    backend, compile_seconds = _open(options, note)
    machine, settings = this_machine() | _card(backend), _settings(options, works, backend)
    if earlier:
        earlier.check(machine, settings)
    note("measuring ceilings")
    ceilings = measure_ceilings(backend)
    if options.peak_tflops is not None:
        ceilings = dataclasses.replace(ceilings, published=1e12 * options.peak_tflops)
    budget = BUDGET_S if options.steps is None else None
    measured: dict[str, Measured] = {}
    for work in works:
        # all sides and processes take what "auto" has become here
        work = dataclasses.replace(work, device=backend.device)
        if work.section != "sample":  # whose "auto" is every precision
            work = dataclasses.replace(work, precision=backend.precision)
        measured[work.section] = (
            measure_start(work, options.model, note)
            if work.section == "start"
            else measure(work, ceilings, options.against_torch, note, budget)
        )
    rows = [row for each in measured.values() for row in each.rows]
    return Benchmark(
        machine=machine,
        versions=_versions(),
        settings=settings,
        ceilings=ceilings,
        load=load,
        compile_seconds=compile_seconds,
        rows=rows,
        sides=[side for each in measured.values() for side in each.sides],
        absent={section: each.absent for section, each in measured.items() if each.absent},
        changes=earlier.changes(rows) if earlier else [],
    )


def _works(options: BenchOptions) -> list[Work]:
    """Our side of each section. UsageError for a length that the model has no room for."""
    config, T = resolve_config(options.model), options.seq_len
    if T > config.max_seq_len:
        raise UsageError(f"--seq-len {T}: {options.model} has {config.max_seq_len} positions")
    if T == config.max_seq_len and "sample" in options.sections:
        raise UsageError(f"--seq-len {T}: leaves no room to sample behind it in the context of {config.max_seq_len}")
    return [
        Work(
            side="llmc",
            section=section,
            config=config,
            batch=options.batch or BATCH[section],
            seq_len=T,
            steps=options.steps or RUNS[section],
            device=options.device,
            precision=options.precision,
            threads=options.threads,
            recompute=options.recompute,
        )
        for section in options.sections
    ]


def _check_peak(options: BenchOptions) -> None:
    """UsageError for a peak that is none, or that nothing is held against."""
    peak = options.peak_tflops
    if peak is None:
        return
    if not (math.isfinite(peak) and peak > 0):
        raise UsageError(f"--peak-tflops {peak:g}: expected a number above 0")
    if "train" not in options.sections:
        raise UsageError(f"--peak-tflops: for the MFU of train, which is not among {', '.join(options.sections)}")


def _card(backend: Backend) -> dict[str, str]:
    """Of the machine, what computes if that is no processor of it."""
    name = backend.kernels.device_name
    return {"card": name} if name else {}


def _require_torch(sections: tuple[str, ...]) -> None:
    """UsageError where PyTorch has nothing to do with any of ``sections``, MissingError where it is not installed."""
    if not set(sections) & set(AGAINST_TORCH):
        raise UsageError(
            f"--against torch: PyTorch has no part in {', '.join(sections)}, only in {', '.join(AGAINST_TORCH)}"
        )
    if importlib.util.find_spec("torch") is None:
        raise MissingError("--against torch: PyTorch is not installed; pip install 'llmc-cli[witness]'")


def _load(cores: int, note: Note) -> float | None:
    """The machine's load before anything is measured, None where the system does not tell; much of it is noted."""
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    load = os.getloadavg()[0]
    if load > BUSY * cores:
        note(f"this machine is busy (load {load:.1f} on {cores} cores): times will mean little")
    return load


def _open(options: BenchOptions, note: Note) -> tuple[Backend, float | None]:
    """The backend, and how long it took to compile its kernels where that had to be done."""
    compiled: list[str] = []

    def tell(text: str) -> None:
        compiled.append(text)
        note(text)

    start = time.perf_counter()
    if options.sections == ("sample",):
        backend = open_sampling(options.device, options.precision, options.threads, tell)
    else:
        backend = open_kernels(options.device, options.precision, options.threads, tell, True)
        if "sample" in options.sections:
            open_sampling(options.device, "auto", options.threads, tell)
    return backend, time.perf_counter() - start if compiled else None


def _settings(options: BenchOptions, works: list[Work], backend: Backend) -> dict[str, Any]:
    return {
        "model": options.model,
        "config": dataclasses.asdict(works[0].config),
        "device": backend.device,
        "precision": backend.precision,
        "threads": backend.threads,
        "sections": {work.section: _shape(work) for work in works},
    }


def _shape(work: Work) -> dict[str, int]:
    """What a section's times depend on."""
    shape = {"batch": work.batch, "seq_len": work.seq_len}
    return {**shape, "recompute": work.recompute} if work.section in ("train", "start") else shape


def _versions() -> dict[str, str]:
    """Of Python and of what speed depends on, as far as it is installed."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
