"""Correct kernels must pass every check, and each planted error must be detected."""

import inspect

import numpy as np
import pytest
from support.faulty_checks import Float32Kernels, faulty_kernels, perturb_last

from llmc_cli.kernels.backend import open_kernels
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.verification.kernel_checks import check_kernels, check_operation, check_training, kernel_check_count

OUTPUTS = [(name, output) for name, operation in OPERATIONS.items() for output in operation.bounds]


def test_correct_kernels_pass():
    checks = list(check_kernels(Float32Kernels()))
    assert len(checks) == kernel_check_count()
    assert all(check.ok for check in checks)
    assert {check.name for check in checks} == {*OPERATIONS, "tiny model"}


def test_cpu_kernels_pass(backend):
    assert [check for check in check_kernels(backend.kernels) if not check.ok] == []


@pytest.mark.parametrize(("operation", "output"), OUTPUTS)
def test_error_in_an_output_is_reported_for_that_output(operation, output):
    checks = list(check_operation(faulty_kernels(operation, output, perturb_last), operation))
    failed = [check.what.partition(":")[0] for check in checks if not check.ok]
    assert failed == [output]


@pytest.mark.parametrize(("operation", "output"), OUTPUTS)
def test_nan_in_an_output_is_reported_for_that_output(operation, output):
    def set_nan(values):
        values.reshape(-1)[0] = np.nan

    checks = list(check_operation(faulty_kernels(operation, output, set_nan), operation))
    assert [check.what.partition(":")[0] for check in checks if not check.ok] == [output]


@pytest.mark.parametrize(
    ("operation", "output"), [(name, output) for name, entry in OPERATIONS.items() for output in entry.accumulated]
)
@pytest.mark.parametrize("always_adds", [True, False])
def test_ignored_acc_is_detected(operation, output, always_adds):
    """An operation that always adds to an output, or never does."""
    kernels = Float32Kernels()
    original = getattr(kernels, operation)
    index = list(inspect.signature(original).parameters).index(output)

    def faulty(*args):
        if args[index] is None:
            original(*args)
            return
        before = np.nan_to_num(args[index].copy(), nan=1.0)
        original(*args[:-1], False)
        if always_adds:
            args[index][...] += before

    setattr(kernels, operation, faulty)
    assert output in [check.what.partition(":")[0] for check in check_operation(kernels, operation) if not check.ok]


# training uses neither of the first two, and AdamW is invariant to the scale of all gradients
@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"attention_cached", "head_logits", "sum_squares"}))
def test_error_is_detected_by_the_training_of_the_tiny_model(operation):
    output = next(iter(OPERATIONS[operation].bounds))

    def scale(values):
        values *= 1.1

    assert any(not check.ok for check in check_training(faulty_kernels(operation, output, scale)))


def test_bf16_has_its_own_bounds():
    kernels = open_kernels("cpu", "bf16", 1).kernels
    assert all(check.ok for check in check_kernels(kernels, "bf16"))
    failed = {check.name for check in check_kernels(kernels, "fp32") if not check.ok}
    assert {"linear_forward", "head_loss", "tiny model"} <= failed
