"""What operations cost: by hand, and added up while they run."""

import inspect

import numpy as np
import pytest

from llmc_cli.benchmark.timed_kernels import TimedKernels
from llmc_cli.kernels.costs import COSTS, Cost
from llmc_cli.kernels.spec import Kernels

NOT_TIMED = ("alloc", "upload", "upload_ahead", "download", "copy", "synchronize", "recorded", "workspace_bytes",
             "bound_bytes", "bind", "publish")  # fmt: skip


def test_every_operation_has_a_cost_with_the_same_arguments():
    operations = {
        name: list(inspect.signature(function).parameters)[1:]
        for name, function in vars(Kernels).items()
        if inspect.isfunction(function) and not name.startswith("_") and name not in NOT_TIMED
    }
    assert {name: list(inspect.signature(cost).parameters) for name, cost in COSTS.items()} == operations


def new(*shape):
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "flops", "moved"),
    [
        ("linear_forward", (new(2, 3), new(2, 5), None, new(3)), 2 * 30, 4 * (6 + 10 + 3 + 15)),
        ("linear_backward", (new(2, 5), new(3, 5), new(3), new(2, 3), new(2, 5), None, False),
         4 * 30, 4 * (10 + 15 + 3 + 6 + 10 + 15)),
        ("linear_backward", (None, new(3, 5), None, new(2, 3), new(2, 5), None, True), 2 * 30, 4 * (2 * 15 + 6 + 10)),
        # two sequences, three positions, four channels: 6 of the 9 pairs, two products
        ("attention_forward", (new(2, 3, 4), new(2, 2, 3), new(2, 3, 12), 2), 2 * 2 * 2 * 6 * 4, 4 * (24 + 12 + 72)),
        ("attention_cached", (new(1, 1, 4), new(1, 2, 9, 2), new(1, 2, 9, 2), new(1, 1, 12), np.array([5]), 2),
         2 * 2 * 6 * 4, 4 * (4 + 12 + 2 * 6 * 4)),
        ("head_loss", (new(2), new(2, 3), new(8, 3), new(2, 3), None, np.zeros(2, np.int32), 7, 1.0, False),
         3 * 2 * 2 * 3 * 7, 4 * (2 + 6 + 24 + 6 + 2 + 21)),
        ("sum_squares", (np.zeros(1), new(9)), 18, 36),
    ],
)  # fmt: skip
def test_costs_by_hand(name, arguments, flops, moved):
    assert COSTS[name](*arguments) == Cost(flops, moved)


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
