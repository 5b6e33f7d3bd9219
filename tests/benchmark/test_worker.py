import warnings

import pytest

from llmc_cli.benchmark.worker import Memory, TaskRunner
from llmc_cli.benchmark.workloads import Task


def test_memory_is_released_after_it_is_measured():
    order = []

    class Workload:
        tasks = ("step",)

        def prepare(self, task):
            return Task(lambda: order.append("run"))

    def peak():
        order.append("peak")
        return 5

    runner = TaskRunner(Workload(), Memory(peak, lambda: order.append("release")))
    assert runner.run("step", 1)["peak_memory"] == 5
    assert runner.run("step", 0)["peak_memory"] == 5
    assert order == ["run", "run", "peak", "release", "run", "peak", "release"]


@pytest.mark.filterwarnings("default")
def test_first_line_of_warnings_is_returned():
    class Workload:
        tasks = ("step",)

        def prepare(self, task):
            return Task(lambda: warnings.warn("slow\nas can be", stacklevel=1))

    assert TaskRunner(Workload()).run("step", 0)["warnings"] == ["slow"]
