"""Costs, shapes and uses of the table of operations; test_spec.py compares the table with the spec."""

import numpy as np
import pytest

from llmc_cli.kernels.operation import Argument, Cost, ModelSizes
from llmc_cli.kernels.operations import OPERATIONS, call_cost, model_uses
from llmc_cli.kernels.random_arrays import random_arguments
from llmc_cli.kernels.reference.kernels import REFERENCE

MODEL = ModelSizes(B=2, T=8, C=16, NH=2, V=67, Vp=128, max_seq_len=16, parameters=1000, eps=1e-5)


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
def test_cost_matches_hand_calculation(name, arguments, flops, moved):
    assert OPERATIONS[name].cost(*arguments) == Cost(flops, moved)


def test_argument_shape_multiplies_axes():
    assert Argument("qkv", "act", ("B", "T", "3C")).shape({"B": 2, "T": 5, "C": 4}) == (2, 5, 12)
    assert Argument("hyper", "float64", ("8",)).shape({}) == (8,)


def test_uses_are_named_and_cover_every_operation():
    uses = list(model_uses(MODEL))
    assert {name for name, _, _ in uses} == set(OPERATIONS)
    tasks = [task for _, task, _ in uses]
    assert len(set(tasks)) == len(tasks)
    assert {"linear_forward qkv", "linear_backward fc", "head_loss gradient", "adamw"} <= set(tasks)


@pytest.mark.parametrize(
    ("name", "sizes"), [pytest.param(name, sizes, id=task) for name, task, sizes in model_uses(MODEL)]
)
def test_random_arguments_run_and_stay_finite(name, sizes):
    arguments = random_arguments(REFERENCE, name, sizes)
    for _ in range(2):
        getattr(REFERENCE, name)(*arguments)
    assert all(np.isfinite(each).all() for each in arguments if isinstance(each, np.ndarray))
    assert min(call_cost(REFERENCE, name, arguments)) > 0


def test_use_can_pass_one_array_twice():
    ((_, _, sizes),) = [use for use in model_uses(MODEL) if use[0] == "residual_norm_backward"]
    dx, *_, dres, acc = random_arguments(REFERENCE, "residual_norm_backward", sizes)
    assert dres is dx
    assert acc is False
