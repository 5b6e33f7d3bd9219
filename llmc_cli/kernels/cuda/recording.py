"""Work that is asked for again and again, as a graph: where launches take longer than what they launch."""

from collections.abc import Callable

from llmc_cli.kernels.cuda.device import Device, Graph


class Recorded:
    """``work``, which asks for the same kernels and products with the same arguments each time it is called.

    The first time it runs as it is: kernels are compiled, and scratch memory grows, which cannot be captured. The
    second time it is captured, and from then on it is one launch.
    """

    def __init__(self, device: Device, work: Callable[[], None]) -> None:
        self._device, self._work = device, work
        self._warm = False
        self._graph: Graph | None = None

    def __call__(self) -> None:
        if not self._warm:
            self._work()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._device.capture(self._work)
        self._graph.launch()
