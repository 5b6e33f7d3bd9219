"""Helpers that run the trainer and compare runs."""

import dataclasses
import threading

from llmc_cli.training.plan import make_plan
from llmc_cli.training.reports import StepReport
from llmc_cli.training.trainer import Trainer


def new_trainer(options, backend):
    return Trainer(make_plan(options, backend), backend)


def run(options, backend, stop_after=None, stop_at=StepReport):
    """Return all reports of a run that is interrupted at the ``stop_at`` report of step ``stop_after``."""
    reports, interrupt = [], threading.Event()
    for report in new_trainer(options, backend).run(interrupt.is_set):
        reports.append(report)
        if isinstance(report, stop_at) and report.step == stop_after:
            interrupt.set()
    return reports


def steps(reports):
    return [report for report in reports if isinstance(report, StepReport)]


def course(reports):
    """Return what a run computed, without times."""
    return [
        dataclasses.astuple(dataclasses.replace(report, ms=0, tokens_per_s=0, mfu=0))
        for report in reports
        if isinstance(report, StepReport)
    ]


def files(folder):
    """Return the bytes of the files of a run that contain no times."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".bin" or path.name.startswith("DONE") or path.name == "main.log"
    }
