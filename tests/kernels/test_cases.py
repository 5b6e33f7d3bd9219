import numpy as np
import pytest

from llmc_cli.kernels.cases import cases
from llmc_cli.kernels.operations import OPERATIONS


@pytest.mark.parametrize("name", OPERATIONS)
def test_cases_have_all_arguments_as_float32_values(name):
    doubles = {argument.name for argument in OPERATIONS[name].arguments if argument.dtype == "float64"}
    for case in cases(name):
        assert list(case.args) == [argument.name for argument in OPERATIONS[name].arguments]
        for argument, value in case.args.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float64 and argument not in doubles:
                assert (value == value.astype(np.float32)).all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_cases_are_the_same_each_time(name):
    for first, second in zip(cases(name), cases(name), strict=True):
        assert first.label == second.label
        for one, two in zip(first.args.values(), second.args.values(), strict=True):
            np.testing.assert_array_equal(one, two)
