import numpy as np

from llmc_cli.benchmark.timed_kernels import TimedKernels
from llmc_cli.kernels.operation import Cost


def test_timed_kernels_add_up_calls_time_and_cost(backend):
    timed = TimedKernels(backend.kernels)
    out, g = timed.alloc((1,), np.float64), timed.alloc((9,), np.float32)
    g[:] = 2
    for _ in range(3):
        timed.sum_squares(out, g)
    assert out[0] == 36
    assert timed.calls == {"sum_squares": 3}
    assert timed.cost == {"sum_squares": Cost(54, 108)}
    assert timed.seconds["sum_squares"] > 0
    timed.clear()
    assert timed.calls == timed.cost == timed.seconds == timed.launches == {}
