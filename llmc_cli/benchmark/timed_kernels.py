"""Kernels that record the time and cost of every operation."""

import time
from collections.abc import Callable
from typing import Any

from llmc_cli.kernels.operation import NO_COST, Cost
from llmc_cli.kernels.operations import OPERATIONS, call_cost
from llmc_cli.kernels.spec import Kernels


class TimedKernels:
    """Forwards to ``kernels`` and adds up each operation's calls, seconds, cost and GPU launches."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cost: dict[str, Cost] = {}
        self.calls: dict[str, int] = {}
        self.launches: dict[str, int] = {}

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work  # the operations within a CUDA graph could not be timed

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._kernels, name)
        if name not in OPERATIONS:
            return operation

        def timed(*arguments: Any) -> None:
            launches = self._kernels.launch_count()
            self._kernels.synchronize()  # exclude work that is still pending
            start = time.perf_counter()
            operation(*arguments)
            self._kernels.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.launches[name] = self.launches.get(name, 0) + self._kernels.launch_count() - launches
            cost, total = call_cost(self._kernels, name, arguments), self.cost.get(name, NO_COST)
            self.cost[name] = Cost(total.flops + cost.flops, total.bytes + cost.bytes)
            self.calls[name] = self.calls.get(name, 0) + 1

        return timed
