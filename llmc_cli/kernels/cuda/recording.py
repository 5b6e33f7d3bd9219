"""Work that is asked for again and again, as a graph: where launches take longer than what they launch."""

import warnings
from collections.abc import Callable

from llmc_cli.kernels.cuda.device import CaptureError, Device, Graph


class Recorded:
    """``work``, which asks for the same kernels and products with the same arguments each time it is called.

    The first time it runs as it is: kernels are compiled, and scratch memory grows, which cannot be captured. The
    second time it is captured, and from then on it is one launch. Where CUDA refuses that, it stays as it was, with a
    warning.
    """

    def __init__(self, device: Device, work: Callable[[], None]) -> None:
        self._device, self._work = device, work
        self._warm = self._refused = False
        self._graph: Graph | None = None

    def __call__(self) -> None:
        if self._warm and self._graph is None and not self._refused:
            try:
                self._graph = self._device.capture(self._work)
            except CaptureError as error:
                warnings.warn(f"--device cuda: launched one by one, since no graph can be made: {error}", stacklevel=2)
                self._refused = True
        if self._graph is None:
            self._work()
            self._warm = True
        else:
            self._graph.launch()
