"""Work that is asked for again and again, as a graph: where launches take longer than what they launch."""

from collections.abc import Callable

from llmc_cli.kernels.cuda.blas import Blas
from llmc_cli.kernels.cuda.device import Device, Graph


class Recorded:
    """``work``, which launches the same kernels with the same arguments each time it is called.

    The first time it runs as it is: kernels are compiled, and scratch memory grows, which cannot be captured. The
    second time it is captured, and from then on it is one launch. Where it multiplies by cuBLAS it always runs as it
    is: CuPy refuses to ask for that while something is captured.
    """

    def __init__(self, device: Device, blas: Blas, work: Callable[[], None]) -> None:
        self._device, self._blas, self._work = device, blas, work
        self._capturable = False
        self._graph: Graph | None = None

    def __call__(self) -> None:
        if self._graph is None and self._capturable:
            self._graph = self._device.capture(self._work)
        if self._graph is not None:
            self._graph.launch()
            return
        before = self._blas.products
        self._work()
        self._capturable = self._blas.products == before
