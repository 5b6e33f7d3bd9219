"""What the tests of ``bench`` measure, and made-up figures."""

from llmc_cli.benchmark.baseline import this_machine
from llmc_cli.benchmark.benchmark import Benchmark
from llmc_cli.benchmark.ceilings import Ceilings
from llmc_cli.benchmark.job import Work
from llmc_cli.benchmark.results import Row, Side
from llmc_cli.models.config import ModelConfig

CONFIG = ModelConfig(16, 67, 2, 2, 16)
CEILINGS = Ceilings("fp32", {"1 x 1 x 1": 100e9, "2 x 2 x 2": 80e9}, {"read": 10e9, "copy": 8e9})
SETTINGS = {"model": "d12", "config": {"channels": 768}, "device": "cpu", "precision": "fp32", "threads": 2,
            "sections": {"train": {"batch": 4, "seq_len": 64}}}  # fmt: skip


def work(section, **changes):
    return Work(**{"side": "llmc", "section": section, "config": CONFIG, "batch": 2, "seq_len": 8, "steps": 2,
                   "device": "cpu", "precision": "fp32", "threads": 1, **changes})  # fmt: skip


def quiet(text):
    pass


def row(name, seconds, **changes):
    return Row(**{"name": name, "seconds": seconds, "best": seconds, "runs": 5, "share": 0.5, "ceiling": "memory",
                  **changes})  # fmt: skip


def benchmark(*rows, **changes):
    return Benchmark(
        **{"machine": this_machine(), "versions": {"python": "3"}, "settings": SETTINGS, "ceilings": CEILINGS,
           "load": 0.1, "compile_seconds": None, "rows": list(rows),
           "sides": [Side("train", "llmc", {"threads": 2}, 5)],
           "absent": {}, "changes": [], **changes}
    )  # fmt: skip
