"""Norm kernels on the emulator: accuracy against float64, the same bits in any order of blocks and
threads, and detection of planted faults."""

import numpy as np
import pytest
from support.cuda_checks import (
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

from llmc_cli.kernels.cuda import norm
from llmc_cli.kernels.cuda.geometry import row_threads
from llmc_cli.kernels.operations import EPS, NORM_SIZES
from llmc_cli.kernels.reference.kernels import REFERENCE

pytestmark = pytest.mark.usefixtures("requires_gxx")

# the ragged sizes of the cases that all backends run, then such as take vectors, several turns or several pieces
NORMS = [*NORM_SIZES, *rows_of("N C", (300, 64), (9, 768), (3, 2056), (9001, 8))]


def check_norm_forward(device, rng, N, C, delta=True, bias=True, in_place=False):
    x = device.reals(rng.standard_normal((N, C)) * 3 + 2)
    before, more = as_float(x), device.reals(rng.standard_normal((N, C)) + 2) if delta else None
    w, b, added = (device.floats(rng.standard_normal(C)) for _ in range(3))
    y, mean, rstd = device.unwritten(N, C, dtype=device.real), device.unwritten(N), device.unwritten(N)
    res = x if in_place else device.unwritten(N, C, dtype=device.real)
    norm.residual_norm_forward(device, res, y, mean, rstd, x, more, added if bias else None, w, b, EPS)
    if not delta:
        assert np.isnan(as_float(res)).all()
    normalized = as_float(res if delta else x)  # what is normalized is the sum as it is stored
    expected = np.empty((N, C)), np.empty(N), np.empty(N)
    REFERENCE.residual_norm_forward(normalized, *expected, normalized, None, None, as_float(w), as_float(b), EPS)
    res_bound, *others = bounds("residual_norm_forward", "res", "y", "mean", "rstd")
    outputs = zip(("y", "mean", "rstd"), (y, mean, rstd), expected, others, strict=True)
    results = [Result(*output) for output in outputs]
    if not delta:
        return results
    return [*results, Result("res", res, before + as_float(more) + as_float(added) * bias, res_bound)]


def check_norm_backward(device, rng, N, C, acc=False, dres=True, into=None):
    """``into`` names the input that dx overwrites."""
    res, dy = device.reals(rng.standard_normal((N, C)) * 3 + 2), device.reals(rng.standard_normal((N, C)))
    past = device.reals(rng.standard_normal((N, C))) if dres else None
    w = device.floats(rng.standard_normal(C))
    exact = as_float(res)
    mean = device.floats(exact.mean(axis=1))
    rstd = device.floats(1 / np.sqrt(exact.var(axis=1) + EPS))
    dw, db = (device.floats(rng.standard_normal(C)) if acc else device.unwritten(C) for _ in range(2))
    expected = np.empty((N, C)), as_float(dw), as_float(db)
    inputs = [as_float(a) for a in (dy, res, mean, rstd, w)]
    REFERENCE.residual_norm_backward(*expected, *inputs, as_float(past) if dres else None, acc)
    dx = {None: device.unwritten(N, C, dtype=device.real), "dres": past, "dy": dy}[into]
    parts = device.unwritten(2, norm.norm_parts(N), C)
    norm.norm_backward(device, dx, parts, dy, res, mean, rstd, w, past)
    norm.sum_partials(device, (dw, db), parts, acc)
    names = ("dx", "dw", "db")
    outputs = zip(names, (dx, dw, db), expected, bounds("residual_norm_backward", *names), strict=True)
    return [Result(*output) for output in outputs]


CASES = [
    *((check_norm_forward, sizes) for sizes in NORMS),
    *((check_norm_forward, {**NORMS[k], "in_place": True}) for k in (2, 5)),
    *((check_norm_forward, {**NORMS[k], "bias": False}) for k in (1, 5)),
    *((check_norm_forward, {**NORMS[k], "delta": False, "bias": False}) for k in (1, 5)),
    *((check_norm_backward, sizes) for sizes in NORMS),
    *((check_norm_backward, {**NORMS[k], "into": into}) for k in (1, 5) for into in ("dres", "dy")),
    *((check_norm_backward, {**NORMS[k], "acc": True, "dres": False}) for k in (1, 5)),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
@precisions
def test_matches_reference(case, bf16):
    run_case(case, bf16)


@pytest.mark.parametrize("case", [(check_norm_forward, NORMS[2]), (check_norm_backward, NORMS[2])], ids=case_id)
@precisions
def test_unaligned_arrays(case, bf16):
    run_case(case, bf16, shift=1)


def test_part_counts():
    assert [norm.column_parts(N) for N in (1, 32, 33, 4096, 8192, 8193, 65536, 10**6)] == [
        1, 1, 2, 128, 256, 249, 256, 256
    ]  # fmt: skip
    assert [norm.norm_parts(N) for N in (1, 16, 17, 8192, 8193, 16384)] == [1, 1, 2, 512, 482, 512]


@pytest.mark.parametrize("parts", [norm.column_parts, norm.norm_parts])
def test_no_part_is_empty(parts):
    for N in range(1, 40_000, 7):
        rows = -(-N // parts(N))
        assert (parts(N) - 1) * rows < N


def test_row_threads():
    assert [row_threads(columns, 8) for columns in (1, 256, 257, 768, 1600, 3072)] == [32, 32, 64, 96, 224, 192]
    assert row_threads(50304, 4, 1024) == 992  # 13 turns; with 1,024 the last would be for a quarter of the threads


FAULTS = [
    Fault("no barrier before partial sums are read", "norm",
          "    __syncthreads();\n    value = warp_sum(lane", "    value = warp_sum(lane",
          (check_norm_forward, NORMS[5])),
    Fault("no barrier before partial sums are overwritten", "norm",
          "parts[lane] : (T)0);\n    __syncthreads();", "parts[lane] : (T)0);", (check_norm_forward, NORMS[5])),
    Fault("warp sum over half a warp", "norm",
          "T warp_sum(T value) {\n#pragma unroll\n    for (int distance = LANES / 2;",
          "T warp_sum(T value) {\n#pragma unroll\n    for (int distance = LANES / 4;", (check_norm_forward, NORMS[3])),
    Fault("alignment not checked", "norm",
          "& 15ull) == 0", "& 15ull) < 16", (check_norm_forward, NORMS[2]), shift=1),
    Fault("sample variance", "norm",
          "block_sum(squares, parts) / C", "block_sum(squares, parts) / (C - 1)", (check_norm_forward, NORMS[3])),
    Fault("mean of unrounded values", "norm",
          "values[k] = as_stored(values[k] + more[k]);", "values[k] += more[k];", (check_norm_forward, NORMS[3]), True),
    Fault("pieces overlap by one row", "norm",
          "const int end = min(N, first + rows);\n    float* dw",
          "const int end = min(N, first + rows + 1);\n    float* dw",
          (check_norm_backward, NORMS[3])),
    Fault("no barrier before row sums are read", "norm",
          "        __syncthreads();\n        const int rows = min(group", "        const int rows = min(group",
          (check_norm_backward, NORMS[4])),
    Fault("row sums overwritten while being read", "norm",
          "        __syncthreads();  // all threads have read", "        // all threads have read",
          (check_norm_backward, NORMS[4])),
    Fault("only the last rows of a piece summed", "norm",
          "start == first ? weight_sums[k] :", "true ? weight_sums[k] :", (check_norm_backward, NORMS[5])),
    Fault("one row too many", "norm",
          "if (r + i < rows) {\n                        load", "if (r + i <= rows) {\n                        load",
          (check_norm_backward, NORMS[1])),
    Fault("one bias for all columns of a thread", "norm",
          "more[k] += bias[k];", "more[k] += bias[0];", (check_norm_forward, NORMS[4])),
    Fault("both sums written to the first output", "norm",
          "blockIdx.y == 0 ? first : second", "first", (check_norm_backward, NORMS[3])),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_detected(fault):
    check_fault_detected(fault)
