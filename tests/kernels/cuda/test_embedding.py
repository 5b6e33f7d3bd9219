"""Embedding kernels on the emulator: accuracy against float64, the same bits in any order of blocks and
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

from llmc_cli.kernels.cuda import embedding
from llmc_cli.kernels.operations import EMBEDDING_SIZES
from llmc_cli.kernels.reference.kernels import REFERENCE

pytestmark = pytest.mark.usefixtures("requires_gxx")

# the ragged sizes of the cases that all backends run, then such as take vectors, several turns or several pieces
EMBEDDINGS = [
    *EMBEDDING_SIZES,
    *rows_of("V T N C", (40, 30, 300, 64), (9, 6, 20, 768), (4, 3, 2100, 8), (3, 3, 5, 2304)),
]


def check_embedding_forward(device, rng, V, T, N, C):
    wte, wpe = device.floats(rng.standard_normal((V, C))), device.floats(rng.standard_normal((T, C)))
    ids, positions = device.ints(rng.integers(0, V, N)), device.ints(rng.integers(0, T, N))
    x, expected = device.unwritten(N, C, dtype=device.real), np.empty((N, C))
    embedding.embedding_forward(device, x, wte, wpe, ids, positions)
    REFERENCE.embedding_forward(expected, as_float(wte), as_float(wpe), ids, positions)
    return [Result("x", x, expected, *bounds("embedding_forward", "x"))]


def check_embedding_backward(device, rng, V, T, N, C, acc=False):
    dx = device.reals(rng.standard_normal((N, C)))
    ids, positions = device.ints(rng.integers(0, V, N)), device.ints(rng.integers(0, max(1, T - 1), N))
    dwte = device.floats(rng.standard_normal((V, C)))
    dwpe = device.floats(rng.standard_normal((T, C))) if acc else device.unwritten(T, C)
    expected = as_float(dwte), as_float(dwpe)
    embedding.embedding_backward(device, dwte, dx, ids)
    embedding.position_backward(device, dwpe, dx, positions, acc)
    REFERENCE.embedding_backward(*expected, as_float(dx), ids, positions, acc)
    dwte_bound, dwpe_bound = bounds("embedding_backward", "dwte", "dwpe")
    return [Result("dwte", dwte, expected[0], dwte_bound), Result("dwpe", dwpe, expected[1], dwpe_bound)]


CASES = [
    *((check_embedding_forward, sizes) for sizes in EMBEDDINGS),
    *((check_embedding_backward, {**sizes, "acc": acc}) for sizes in EMBEDDINGS for acc in (False, True)),
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
@precisions
def test_matches_reference(case, bf16):
    run_case(case, bf16)


@pytest.mark.parametrize(
    "case",
    [(check_embedding_forward, EMBEDDINGS[3]), (check_embedding_backward, {**EMBEDDINGS[3], "acc": True})],
    ids=case_id,
)
@precisions
def test_unaligned_arrays(case, bf16):
    run_case(case, bf16, shift=1)


FAULTS = [
    Fault("access past the end of a row", "embedding",
          "c < C; c += blockDim.x * W) {\n        float sum[W];",
          "c <= C; c += blockDim.x * W) {\n        float sum[W];",
          (check_embedding_forward, EMBEDDINGS[1])),
    Fault("equal ids summed repeatedly", "embedding",
          "if (__syncthreads_or(any)) {\n            return;", "if (__syncthreads_or(any)) {\n            break;",
          (check_embedding_backward, EMBEDDINGS[2])),
    Fault("match indices per warp only", "embedding",
          "= count + __popc(", "= __popc(", (check_embedding_backward, EMBEDDINGS[2])),
    Fault("no barrier before the list of matches is read", "embedding",
          "    __syncthreads();\n    return count;", "    return count;", (check_embedding_backward, EMBEDDINGS[2])),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_detected(fault):
    check_fault_detected(fault)
