"""Optimizer kernels on the emulator: accuracy against float64, the same bits in any order of blocks and
threads, and detection of planted faults."""

import itertools

import numpy as np
import pytest
from support.cuda_checks import Fault, Result, as_float, bounds, case_id, check_fault_detected, precisions, run_case

from llmc_cli.kernels.cuda import optimizer
from llmc_cli.kernels.operations import FLAT_SIZES
from llmc_cli.kernels.reference.kernels import REFERENCE

pytestmark = pytest.mark.usefixtures("requires_gxx")

MANY = [*range(1, 40), *range(60, 3000, 7), 5000]  # segments of 1, of 7 and of thousands of elements


def check_sum_squares(device, rng, P):
    g = device.floats(rng.standard_normal(P))
    out = device.unwritten(1, dtype=np.float64)
    optimizer.sum_squares(device, out, device.unwritten(optimizer.MAX_SQUARE_PARTS, dtype=np.float64), g)
    return [Result("out", out, np.dot(as_float(g), as_float(g))[None], *bounds("sum_squares", "out"))]


def check_adamw(device, rng, P, max_norm=0.3, cuts=None):
    """``cuts`` are the segment ends; every fifth segment is left out as a gap."""
    ends = [*(cuts or sorted({P // 3, P // 2} - {0, P})), P]
    rows = [(a, b - a, k % 2) for k, (a, b) in enumerate(itertools.pairwise([0, *ends])) if cuts is None or k % 5 != 3]
    segments = np.array(rows, np.int64)
    master, g = (device.floats(rng.standard_normal(P)) for _ in range(2))
    m, v = device.floats(rng.standard_normal(P) * 0.1), device.floats(np.square(rng.standard_normal(P)))
    hyper = np.array([1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3, max_norm])
    sumsq = np.array([np.dot(as_float(g), as_float(g))])
    old = [as_float(a) for a in (master, m, v)]
    expected = [a.copy() for a in old]
    REFERENCE.adamw(*expected, as_float(g), segments, hyper, sumsq)
    covered = np.zeros(P, bool)
    for offset, length, _ in segments:
        covered[offset : offset + length] = True
    table, doubles = device.put(segments, np.int64), [device.put(a, np.float64) for a in (hyper, sumsq)]
    optimizer.adamw(device, master, m, v, g, table, *doubles)
    outputs = zip(("master", "m", "v"), (master, m, v), expected, old, strict=True)
    return [
        Result(name, found, np.where(covered, wanted, before), *bounds("adamw", name))
        for name, found, wanted, before in outputs
    ]


CASES = [
    *((check_sum_squares, sizes) for sizes in FLAT_SIZES),
    *((check_adamw, {**FLAT_SIZES[k], "max_norm": max_norm}) for k in (0, 1, 2) for max_norm in (0.0, 0.3, 1e9)),
    (check_adamw, FLAT_SIZES[3]),
    (check_adamw, {"P": 9000, "cuts": MANY}),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
@precisions
def test_matches_reference(case, bf16):
    run_case(case, bf16)


@pytest.mark.parametrize("case", [(check_sum_squares, FLAT_SIZES[1]), (check_adamw, FLAT_SIZES[1])], ids=case_id)
@precisions
def test_unaligned_arrays(case, bf16):
    run_case(case, bf16, shift=1)


FAULTS = [
    Fault("squares in float32", "optimizer",
          "sum += (double)values[k] * values[k];", "sum += values[k] * values[k];", (check_sum_squares, FLAT_SIZES[1])),
    Fault("elements between segments updated", "optimizer",
          "if (k < K && segments[3 * k] <= i) {", "if (k < K) {", (check_adamw, {"P": 9000, "cuts": MANY})),
    Fault("four elements use the first one's decay", "optimizer",
          "here[0] <= first && first + FLOATS <= here[0] + here[1]", "here[0] <= first && first + FLOATS <= P",
          (check_adamw, FLAT_SIZES[1])),
    Fault("no barrier before the hyperparameters are read", "optimizer",
          "    }\n    __syncthreads();\n    const Step step", "    }\n    const Step step",
          (check_adamw, FLAT_SIZES[1])),
    Fault("gradients not clipped", "optimizer",
          "clipped ? (float)(max_norm / sqrt(sumsq)) : 1.0f", "1.0f",
          (check_adamw, {**FLAT_SIZES[1], "max_norm": 0.3})),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_detected(fault):
    check_fault_detected(fault)
