"""Repeated work replayed as a CUDA graph, which removes the cost of launching each kernel from Python."""

import warnings
from collections.abc import Callable

from llmc_cli.kernels.cuda.device import CaptureError, Device, Graph


class Replayable:
    """A callable that runs ``work`` and, from its second call on, replays it as a CUDA graph.

    ``work`` must launch the same kernels and matrix products with the same arguments on every call. The first call runs
    it directly: that compiles kernels and grows scratch memory, neither of which can be captured. The second call
    captures and launches a graph, later calls launch the graph. If CUDA rejects the capture, a warning is issued and
    every call runs ``work`` directly.
    """

    def __init__(self, device: Device, work: Callable[[], None]) -> None:
        self._device, self._work = device, work
        self._warm = self._rejected = False
        self._graph: Graph | None = None

    def __call__(self) -> None:
        if self._warm and self._graph is None and not self._rejected:
            try:
                self._graph = self._device.capture(self._work)
            except CaptureError as error:
                warnings.warn(
                    f"--device cuda: CUDA graph capture failed, kernels are launched one by one: {error}", stacklevel=2
                )
                self._rejected = True
        if self._graph is None:
            self._work()
            self._warm = True
        else:
            self._graph.launch()
