"""The classifier kernel on the emulator: accuracy against float64, the same bits in any order of blocks and
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

from llmc_cli.kernels.cuda import classifier
from llmc_cli.kernels.operations import HEAD_SIZES

pytestmark = pytest.mark.usefixtures("requires_gxx")

# the ragged sizes of the cases that all backends run, then such as take vectors, several turns or several pieces
HEADS = [{k: row[k] for k in ("N", "V", "Vp")} for row in HEAD_SIZES] + rows_of(
    "N V Vp", (3, 4999, 5003), (3, 5000, 5056), (2, 50257, 50304)
)


def check_softmax_loss(device, rng, N, V, Vp, gradient=True, in_place=False):
    logits = device.floats(rng.standard_normal((N, Vp)) * 3)
    targets = device.ints(rng.integers(0, V, N))
    if N > 1:
        targets[::4] = -1
    counted, exact, dloss = targets >= 0, as_float(logits)[:, :V], 1.0 / N
    logits[:, V:] = np.nan  # padding counts for nothing
    logits[~counted] = np.nan
    losses = device.unwritten(N)
    dlogits = logits if in_place else device.unwritten(N, Vp, dtype=device.real)
    classifier.softmax_loss(device, dlogits, losses, logits, targets, V, dloss, gradient)
    exact = exact - exact.max(axis=1, keepdims=True)
    log_probabilities = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    rows = np.arange(N)
    losses_bound, bound = bounds("head_loss", "losses", "dx")
    results = [Result("losses", losses, np.where(counted, -log_probabilities[rows, targets], 0.0), losses_bound)]
    if not gradient:
        assert in_place or np.isnan(as_float(dlogits)).all()
        return results
    expected = np.zeros((N, Vp))
    expected[:, :V] = np.exp(log_probabilities)
    expected[rows, targets] -= 1.0
    expected *= dloss * counted[:, None]
    assert not as_float(dlogits)[:, V:].any()
    return [*results, Result("dlogits", dlogits, expected, bound)]


CASES = [
    *((check_softmax_loss, sizes) for sizes in HEADS),
    *((check_softmax_loss, {**HEADS[k], "gradient": False}) for k in (1, -2)),
]
IN_PLACE = [(check_softmax_loss, {**HEADS[k], "in_place": True}) for k in (1, -3, -2)]


@pytest.mark.parametrize("case", CASES, ids=case_id)
@precisions
def test_matches_reference(case, bf16):
    run_case(case, bf16)


@pytest.mark.parametrize("case", IN_PLACE, ids=case_id)
def test_gradient_in_place_of_logits(case):
    run_case(case, bf16=False)


@pytest.mark.parametrize("case", [(check_softmax_loss, HEADS[1])], ids=case_id)
@precisions
def test_unaligned_arrays(case, bf16):
    run_case(case, bf16, shift=1)


def test_large_logits():
    """Logits of ±1e4 do not overflow."""
    with EmulatedDevice(bf16=False) as device:
        logits = device.floats([[1e4, 0.0, -1e4, 7.0], [-1e4, 0.0, 1e4, 7.0], [1e4, 0.0, -1e4, 7.0]])
        losses, targets = device.unwritten(3), device.ints([0, 2, 1])
        classifier.softmax_loss(device, None, losses, logits, targets, 3, 1.0, False)
        assert losses.tolist() == [0.0, 0.0, 1e4]


FAULTS = [
    Fault("target -1 not ignored", "classifier",
          "if (target < 0) {", "if (target < -1) {", (check_softmax_loss, HEADS[1])),
    Fault("padding included in the sum", "classifier",
          "if (c + k < V) {\n                total +=", "if (c + k < Vp) {\n                total +=",
          (check_softmax_loss, HEADS[2])),
    Fault("gradient of the padding not zeroed", "classifier",
          "c + k < V ? difference * dloss : 0.0f", "difference * dloss", (check_softmax_loss, HEADS[1])),
    Fault("wrong row stride", "classifier",
          "Real* drow = dlogits + n * Vp", "Real* drow = dlogits + n * V", (check_softmax_loss, HEADS[1])),
    Fault("target logit read after being overwritten", "classifier",
          "(top - correct)", "(top - logits[target])", IN_PLACE[1]),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_detected(fault):
    check_fault_detected(fault)
