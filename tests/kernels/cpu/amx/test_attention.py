"""Attention on emulated tiles, which a machine without AMX can run; test_kernels.py has that on real ones."""

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
    """All on the CPU but attention, which is on emulated tiles."""
    return loading.load(loading.KERNELS).CpuKernels(2, attention=emulated()["attention"])


@pytest.mark.parametrize("operation", ["attention_forward", "attention_backward"])
def test_against_reference(kernels, operation):
    for case in cases(operation):
        found, expected = run(kernels, case), run(REFERENCE, case)
        for name, values in found.items():
            check = compare(operation, name, values, expected[name], OPERATIONS[operation].bound(name, "bf16"))
            assert check.ok, (case.label, check)


def test_scratch_need_not_be_clean(kernels):
    """What a longer call leaves there does not reach the results of the next."""
    case = next(case for case in cases("attention_backward") if "T=65" in case.label)
    clean = run(kernels, case)["dqkv"]
    kernels.scratch("attention", (2, kernels.attention.work_floats(65, 64)))[:] = np.nan
    assert np.array_equal(run(kernels, case)["dqkv"], clean)
