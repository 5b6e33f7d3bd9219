"""Bias, GELU and weight rounding kernels on the emulator: accuracy against float64, the same bits in any order of
blocks and threads, and detection of planted faults."""

import numpy as np
import pytest
from support.cuda_checks import (
    EmulatedDevice,
    Fault,
    Result,
    as_float,
    bounds,
    case_id,
    check_fault_detected,
    precisions,
    rows_of,
    run_case,
)

from llmc_cli.formats import bfloat16
from llmc_cli.kernels.cuda import elementwise, norm
from llmc_cli.kernels.operations import LINEAR_SIZES
from llmc_cli.kernels.reference.kernels import gelu, gelu_derivative

pytestmark = pytest.mark.usefixtures("requires_gxx")

# the ragged sizes of the cases that all backends run, then such as take vectors, several turns or several pieces
LINEARS = [
    *({"N": row["N"], "O": row["O"]} for row in LINEAR_SIZES),
    *rows_of("N O", (300, 64), (9, 768), (5, 3072), (2, 2304)),
]


def check_bias(device, rng, N, O, acc=False):  # noqa: E741
    """Check adding a bias and the gradient of a bias."""
    y, b = device.reals(rng.standard_normal((N, O))), device.floats(rng.standard_normal(O))
    db = device.floats(rng.standard_normal(O)) if acc else device.unwritten(O)
    expected_db = as_float(y).sum(axis=0) + (as_float(db) if acc else 0.0)
    parts = device.unwritten(1, norm.column_parts(N), O)
    norm.column_partials(device, parts, y)
    norm.sum_partials(device, (db,), parts, acc)
    expected_y = as_float(y) + as_float(b)
    elementwise.add_bias(device, y, b)
    (bound,) = bounds("linear_backward", "db")
    return [Result("y", y, expected_y, 1e-7), Result("db", db, expected_db, bound)]


def check_gelu(device, rng, N, O):  # noqa: E741
    pre, b = device.reals(rng.standard_normal((N, O)) * 3), device.floats(rng.standard_normal(O))
    act, again = (device.unwritten(N, O, dtype=device.real) for _ in range(2))
    dpre = device.reals(rng.standard_normal((N, O)))
    before = as_float(dpre)
    expected_pre = as_float(pre) + as_float(b)
    elementwise.bias_gelu_forward(device, act, pre, b)
    elementwise.gelu_forward(device, again, pre)
    elementwise.gelu_backward(device, dpre, pre)
    assert act.tobytes() == again.tobytes()
    stored = as_float(pre)
    (bound,) = bounds("gelu_forward", "act")
    return [
        Result("pre", pre, expected_pre, 1e-7),
        Result("act", act, gelu(stored), bound),
        Result("dpre", dpre, before * gelu_derivative(stored), *bounds("gelu_linear_backward", "dpre")),
    ]


def check_round_weights(device, rng, sizes):
    sources = [device.floats(rng.standard_normal(size) * 10.0 ** rng.integers(-42, 38, size)) for size in sizes]
    special = np.array(
        [
            *(0x3F808000, 0x3F818000),  # ties, down and up to the even number
            *(0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000001),  # the largest, infinities, the least
            *(0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000),  # NaNs; a carry would make numbers of some
        ],
        np.uint32,
    )
    for array in sources:
        array[: special.size] = special.view(np.float32)[: array.size]
    targets = [device.unwritten(size, dtype=np.uint16) for size in sizes]
    rows = [(a.ctypes.data, b.ctypes.data, a.size) for a, b in zip(sources, targets, strict=True)]
    elementwise.round_weights(device, device.put(rows, np.int64))
    for array, target in zip(sources, targets, strict=True):
        expected = np.empty(array.shape, np.uint16)
        bfloat16.from_float32(array, expected)
        both_nan = np.isnan(as_float(target)) & np.isnan(as_float(expected))
        assert ((target == expected) | both_nan).all()
    return []


CASES = [
    *((check_bias, {**sizes, "acc": acc}) for sizes in LINEARS for acc in (False, True)),
    *((check_gelu, sizes) for sizes in LINEARS),
    (check_round_weights, {"sizes": (1, 1000, 8, 4099)}),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
@precisions
def test_matches_reference(case, bf16):
    run_case(case, bf16)


@pytest.mark.parametrize(
    "case", [(check_bias, LINEARS[6]), (check_gelu, LINEARS[6]), (check_round_weights, {"sizes": (1000,)})], ids=case_id
)
@precisions
def test_unaligned_arrays(case, bf16):
    run_case(case, bf16, shift=1)


def test_gelu_over_the_whole_range():
    """All exponents of both signs are accurate to a few units in the last place."""
    x = np.concatenate([np.logspace(-30, 30, 4001), np.linspace(-12.0, 12.0, 20_001)])
    with EmulatedDevice(bf16=False) as device:
        pre = device.floats(np.concatenate([x, -x]))
        act, dpre = device.unwritten(pre.size), device.floats(np.ones(pre.size))
        elementwise.gelu_forward(device, act, pre)
        elementwise.gelu_backward(device, dpre, pre)
        exact = as_float(pre)
        # where |gelu| < 1e-6 for large negative x only the absolute error matters
        allowed = 5e-7 * np.abs(gelu(exact)) + 1e-7 * np.minimum(1.0, np.abs(exact))
        assert (np.abs(act - gelu(exact)) <= allowed).all()
        assert np.abs(dpre - gelu_derivative(exact)).max() <= 1e-6


FAULTS = [
    Fault("one column too many", "norm",
          "column < WARP * W && start + column < O", "column < WARP * W && start + column <= O",
          (check_bias, LINEARS[2])),
    Fault("no barrier before stripes are overwritten", "norm",
          "            out[start + column] = total;\n        }\n        __syncthreads();",
          "            out[start + column] = total;\n        }", (check_bias, LINEARS[6]), shift=1),
    Fault("bias gradient not accumulated", "norm",
          "out[o] = acc ? out[o] + total : total;", "out[o] = total;", (check_bias, {**LINEARS[3], "acc": True})),
    Fault("last row skipped", "elementwise",
          "if (first + row < N) {\n                Real* here",
          "if (first + row < N - 1) {\n                Real* here",
          (check_bias, LINEARS[2])),
    Fault("GELU of unrounded values", "elementwise",
          "values[k] = as_stored(values[k] + bias[k]);", "values[k] += bias[k];", (check_gelu, LINEARS[3]), True),
    Fault("truncation instead of rounding", "elementwise",
          "0x40u : rounded", "0x40u : bits >> 16", (check_round_weights, {"sizes": (100,)})),
    Fault("ties rounded up", "elementwise",
          "0x40u : rounded", "0x40u : (bits + 0x8000u) >> 16", (check_round_weights, {"sizes": (100,)})),
    Fault("NaN rounded like a finite number", "elementwise",
          "? (bits >> 16) | 0x40u : rounded", "? rounded : rounded", (check_round_weights, {"sizes": (100,)})),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_detected(fault):
    check_fault_detected(fault)
