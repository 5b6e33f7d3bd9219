"""Products with few rows on the emulator: accuracy against float64, the same bits in any order of blocks and
threads, and detection of planted faults."""

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
from support.cuda_emulator import emulator

from llmc_cli.kernels.cuda import elementwise, few_rows
from llmc_cli.kernels.reference.kernels import gelu

pytestmark = pytest.mark.usefixtures("requires_gxx")


def check_linear(device, rng, N, I, O, bias=True, activation=False):  # noqa: E741
    x, w = device.reals(rng.standard_normal((N, I))), device.reals(rng.standard_normal((O, I)))
    b = device.floats(rng.standard_normal(O)) if bias else None
    y = device.unwritten(N, O, dtype=device.real)
    act = device.unwritten(N, O, dtype=device.real) if activation else None
    few_rows.linear(device, y, act, x, w, b)
    expected = as_float(x) @ as_float(w).T + (as_float(b) if bias else 0.0)
    results = [Result("y", y, expected, *bounds("linear_forward", "y"))]
    if activation:
        again = device.unwritten(N, O, dtype=device.real)
        elementwise.gelu_forward(device, again, y)
        assert act.tobytes() == again.tobytes()
        results.append(Result("act", act, gelu(as_float(y)), *bounds("gelu_forward", "act")))
    return results


def check_head(device, rng, N, C, V, Vp):
    x, w = device.reals(rng.standard_normal((N, C))), device.reals(rng.standard_normal((Vp, C)))
    logits = device.unwritten(N, V)
    few_rows.head_logits(device, logits, x, w)
    return [Result("logits", logits, as_float(x) @ as_float(w)[:V].T, *bounds("head_logits", "logits"))]


# one column, ragged ones, one vector and several a thread, all warps and one; rows from one to the most
LINEARS = rows_of(
    "N I O", (1, 1, 1), (1, 24, 40), (2, 64, 131), (3, 2056, 6), (4, 257, 9), (7, 5, 13), (8, 768, 9), (1, 3072, 10)
)
HEADS = rows_of("N C V Vp", (1, 3, 5, 8), (1, 64, 257, 320), (8, 24, 100, 128), (5, 17, 250, 256))
CASES = [
    *((check_linear, each) for each in LINEARS),
    *((check_linear, {**LINEARS[k], "bias": False}) for k in (1, 6)),
    *((check_linear, {**LINEARS[k], "activation": True}) for k in (1, 2, 4, 6)),
    *((check_head, each) for each in HEADS),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
@precisions
def test_matches_reference(case, bf16):
    run_case(case, bf16)


@pytest.mark.parametrize("case", [CASES[2], (check_head, HEADS[1])], ids=case_id)
@precisions
def test_unaligned_arrays(case, bf16):
    run_case(case, bf16, shift=1)


@precisions
def test_row_does_not_depend_on_other_rows(bf16):
    """A sample does not depend on the batch size."""
    with EmulatedDevice(bf16) as device:
        rng = np.random.default_rng(0)
        x, w = device.reals(rng.standard_normal((8, 264))), device.reals(rng.standard_normal((10, 264)))
        found = []
        for N in (1, 2, 5, 8):
            y = device.unwritten(N, 10, dtype=device.real)
            few_rows.linear(device, y, None, x[:N], w, None)
            found.append(y[0].tobytes())
        assert len(set(found)) == 1


def test_each_weight_is_read_once():
    """Every element of w is read once for all rows, counted by the emulator's checked accesses."""
    with EmulatedDevice(False) as device:
        rng = np.random.default_rng(0)
        counts = []
        for O in (4, 8):  # noqa: E741
            x, w = device.reals(rng.standard_normal((8, 128))), device.reals(rng.standard_normal((O, 128)))
            emulator.counters()
            few_rows.head_logits(device, device.unwritten(8, O), x, w)
            counts.append(emulator.counters()["accesses"])
        assert counts[1] == 2 * counts[0]


FAULTS = [
    Fault("no barrier before the warps' sums are read", "few_rows",
          "    __syncthreads();\n    float total", "    float total", (check_linear, LINEARS[6])),
    Fault("rows past the end of w", "few_rows",
          "(size_t)min(first + o, O - 1)", "(size_t)(first + o)", (check_linear, LINEARS[4])),
    Fault("rows past the end of x", "few_rows",
          "(size_t)min(n, N - 1)", "(size_t)n", (check_linear, LINEARS[5])),
    Fault("columns past the end of y", "few_rows",
          "if (n < N && o < O) {", "if (n < N) {", (check_linear, LINEARS[2])),
    Fault("logits of the padding written", "few_rows",
          "if (n < N && v < V) {", "if (n < N) {", (check_head, HEADS[3])),
    Fault("alignment not checked", "few_rows",
          "I % WIDTH == 0 && aligned16(x, w)", "I % WIDTH == 0", (check_linear, LINEARS[2]), shift=1),
    Fault("16-byte access past the end of a row", "few_rows",
          "I % WIDTH == 0 && aligned16(x, w)", "aligned16(x, w)", (check_linear, LINEARS[4])),
    Fault("last warp skipped", "few_rows",
          "warp < blockDim.x / WARP; warp++", "warp + 1 < blockDim.x / WARP; warp++", (check_linear, LINEARS[6])),
    Fault("lanes keep the values they send", "few_rows",
          "const float kept = upper ? numbers[k + half] : numbers[k];",
          "const float kept = upper ? numbers[k] : numbers[k + half];", (check_linear, LINEARS[6])),
    Fault("incomplete reduction over lanes", "few_rows",
          "int left = WARP / K / 2; left > 0", "int left = WARP / K / 4; left > 0", (check_linear, LINEARS[1])),
    Fault("sums of the wrong row", "few_rows",
          "sums[n * OUTPUTS + o] += values[k]", "sums[o * ROWS + n] += values[k]", (check_linear, LINEARS[6])),
    Fault("first iteration only", "few_rows",
          "i < I; i += blockDim.x * W) {\n        float weights",
          "i < min(I, (int)blockDim.x * W); i += blockDim.x * W) {\n        float weights",
          (check_linear, LINEARS[7])),
    Fault("bias of the block's first column", "few_rows",
          "total + b[o] : total", "total + b[blockIdx.x * OUTPUTS] : total", (check_linear, LINEARS[1])),
    Fault("GELU of unrounded values", "few_rows",
          "const float stored = as_stored(b ? total + b[o] : total);",
          "const float stored = b ? total + b[o] : total;",
          (check_linear, {**LINEARS[6], "activation": True}), bf16=True),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_detected(fault):
    check_fault_detected(fault)
