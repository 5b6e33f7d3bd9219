"""Kernels with planted faults, and damaged copies of the tiny model's debug state."""

import inspect
import shutil

import numpy as np
import pytest
from support.paths import TINY_GPT2

from llmc_cli.formats.debug_state import read_debug_state
from llmc_cli.formats.header import HEADER_BYTES
from llmc_cli.formats.weights import read_header
from llmc_cli.kernels.reference.kernels import ReferenceKernels


class Float32Kernels(ReferenceKernels):
    """The reference kernels in float32."""

    dtype = np.float32

    def sum_squares(self, out, g):
        super().sum_squares(out, g.astype(np.float64))


def faulty_kernels(operation, output, change):
    """Return float32 kernels that apply ``change`` to one output of one operation after computing it."""
    kernels = Float32Kernels()
    original = getattr(kernels, operation)
    index = list(inspect.signature(original).parameters).index(output)

    def faulty(*args):
        original(*args)
        if args[index] is not None:
            change(args[index])

    setattr(kernels, operation, faulty)
    return kernels


def perturb_last(values):
    """Add a thousandth of the largest absolute value to the last element."""
    values.reshape(-1)[-1] += 1e-3 * np.abs(values).max()


def damaged_state(tmp_path, offset, value=None):
    """Copy the debug state, and replace the float32 at byte ``offset``, or flip its bit 30 if no value is given."""
    path = tmp_path / "state.bin"
    shutil.copy(TINY_GPT2 / "debug_state.bin", path)
    with path.open("r+b") as file:
        file.seek(offset)
        word = int.from_bytes(file.read(4), "little")
        word = word ^ (1 << 30) if value is None else int(np.float32(value).view(np.uint32))
        file.seek(offset)
        file.write(word.to_bytes(4, "little"))
    return path


def _state_offsets():
    """The byte offsets of the largest, smallest and last values of the logits, the loss and each gradient."""
    state = read_debug_state(TINY_GPT2 / "debug_state.bin", read_header(TINY_GPT2 / "model.bin"))
    start = HEADER_BYTES + 8 * state.x.size
    for name, values in {"logits": state.logits, "loss": np.float32([state.loss]), **state.grads}.items():
        sizes = np.abs(values.reshape(-1))
        for which, index in (("largest", sizes.argmax()), ("smallest", sizes.argmin()), ("last", -1)):
            yield pytest.param(name, start + 4 * (int(index) % sizes.size), id=f"{name}-{which}")
        start += values.nbytes


STATE_OFFSETS = list(_state_offsets())
