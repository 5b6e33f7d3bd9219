"""Kernels that record the time and cost of every operation."""

import time
from collections.abc import Callable
from typing import Any

from llmc_cli.kernels.costs import COSTS, NO_COST, Cost, cost
from llmc_cli.kernels.spec import Kernels


def launches(kernels: Kernels) -> int:
    """Kernels, matrix products and graphs of both that a GPU has been asked for so far; 0 on the CPU."""
    device = getattr(kernels, "device", None)
    return 0 if device is None else int(device.launches)


class TimedKernels:
    """Kernels that keep account of each operation's calls, time, cost and launches."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.seconds: dict[str, float] = {}
        self.cost: dict[str, Cost] = {}
        self.calls: dict[str, int] = {}
        self.launches: dict[str, int] = {}

    def recorded(self, work: Callable[[], None]) -> Callable[[], None]:
        return work  # a graph would tell nothing of its operations

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._kernels, name)
        if name not in COSTS:
            return operation

        def timed(*arguments: Any) -> None:
            launched = launches(self._kernels)
            self._kernels.synchronize()  # what was asked for before is not this operation's
            start = time.perf_counter()
            operation(*arguments)
            self._kernels.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.launches[name] = self.launches.get(name, 0) + launches(self._kernels) - launched
            flops, moved = cost(self._kernels, name, arguments)
            before = self.cost.get(name, NO_COST)
            self.cost[name] = Cost(before.flops + flops, before.bytes + moved)
            self.calls[name] = self.calls.get(name, 0) + 1

        return timed
