"""Attention on emulated AMX tiles; test_kernels.py tests it on real ones."""

import numpy as np
import pytest
from support.emulated_tiles import emulated

from llmc_cli.kernels.cases import cases, run
from llmc_cli.kernels.cpu import loading
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.reference.kernels import REFERENCE
from llmc_cli.verification.comparison import compare


@pytest.fixture(scope="module")
def kernels():
    """CPU kernels with attention on emulated tiles."""
    return loading.load(loading.KERNELS).CpuKernels(2, attention=emulated()["attention"])


@pytest.mark.parametrize("operation", ["attention_forward", "attention_backward"])
def test_against_reference(kernels, operation):
    for case in cases(operation):
        found, expected = run(kernels, case), run(REFERENCE, case)
        for name, values in found.items():
            check = compare(operation, name, values, expected[name], OPERATIONS[operation].bound(name, "bf16"))
            assert check.ok, (case.label, check)


def test_results_do_not_depend_on_scratch_contents(kernels):
    case = next(case for case in cases("attention_backward") if "T=65" in case.label)
    clean = run(kernels, case)["dqkv"]
    kernels.scratch("attention", (2, kernels.attention.work_floats(65, 64)))[:] = np.nan
    assert np.array_equal(run(kernels, case)["dqkv"], clean)
