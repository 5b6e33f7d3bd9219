"""Inputs and made-up results for the benchmark tests."""

from llmc_cli.benchmark.baseline import this_machine
from llmc_cli.benchmark.benchmark import Benchmark
from llmc_cli.benchmark.ceilings import Ceilings
from llmc_cli.benchmark.job import Job
from llmc_cli.benchmark.results import Row, WorkerInfo
from llmc_cli.models.config import ModelConfig

CONFIG = ModelConfig(16, 67, 2, 2, 16)
CEILINGS = Ceilings("fp32", {"1 x 1 x 1": 100e9, "2 x 2 x 2": 80e9}, {"read": 10e9, "copy": 8e9})
SETTINGS = {"model": "d12", "config": {"channels": 768}, "device": "cpu", "precision": "fp32", "threads": 2,
            "sections": {"train": {"batch": 4, "seq_len": 64}}}  # fmt: skip


def make_job(section, **changes):
    return Job(**{"implementation": "llmc", "section": section, "config": CONFIG, "batch": 2, "seq_len": 8, "steps": 2,
                  "device": "cpu", "precision": "fp32", "threads": 1, **changes})  # fmt: skip


def ignore(text):
    """A log callback that discards its messages."""


def make_row(name, seconds, **changes):
    return Row(**{"name": name, "seconds": seconds, "best": seconds, "runs": 5, "share": 0.5, "ceiling": "memory",
                  **changes})  # fmt: skip


def make_benchmark(*rows, **changes):
    return Benchmark(
        **{"machine": this_machine(), "versions": {"python": "3"}, "settings": SETTINGS, "ceilings": CEILINGS,
           "load": 0.1, "compile_seconds": None, "rows": list(rows),
           "workers": [WorkerInfo("train", "llmc", {"threads": 2}, 5)],
           "unavailable": {}, "changes": [], **changes}
    )  # fmt: skip
