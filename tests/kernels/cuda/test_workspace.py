"""The planned scratch memory equals what a training step allocates."""

import numpy as np
import pytest
from support.cuda_recording_device import RecordingDevice

from llmc_cli.kernels.cuda.kernels import MAX_HEAD_ROWS, CudaKernels, head_rows
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.training.optimizer import AdamW


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("B", "T"), [(1, 8), (3, 500), (5, 1000), (16, 1024)])
def test_planned_bytes_equal_allocated_bytes(precision, B, T):
    config = ModelConfig(1024, 500, 2, 3, 192)
    kernels = CudaKernels(RecordingDevice(precision == "bf16", 80), precision)
    model = GPT2(config, kernels)
    model.prepare(B, T)
    optimizer = AdamW(model)
    ids = np.zeros((B, T), np.int32)
    model.forward(ids)
    model.backward(ids, 1.0, acc=False)
    optimizer.gradient_norm()
    held = sum(each.nbytes for each in (*kernels._scratch.values(), kernels.matmul._workspace))
    assert held == kernels.workspace_bytes(B, T, config.channels, config.num_heads, config.padded_vocab_size)


def test_head_rows():
    assert [head_rows(N) for N in (1, MAX_HEAD_ROWS, MAX_HEAD_ROWS + 1, 3 * MAX_HEAD_ROWS)] == [
        1, MAX_HEAD_ROWS, MAX_HEAD_ROWS // 2 + 1, MAX_HEAD_ROWS
    ]  # fmt: skip
