import numpy as np
import pytest

from llmc_cli.data.batches import Batches
from llmc_cli.evaluation.validation import mean_loss
from llmc_cli.formats.shard import write_shard
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.initialization import initialize

B, T = 2, 8


@pytest.fixture
def model(backend):
    model = GPT2(ModelConfig(T, 37, 1, 2, 8), backend.kernels)
    initialize(model, 1)
    model.prepare(B, T, train=False)
    return model


@pytest.fixture
def batches(tmp_path):
    """60 tokens: 3 batches of 2 x 8."""
    write_shard(tmp_path / "val.bin", np.random.default_rng(0).integers(0, 37, 60))
    return Batches(str(tmp_path / "val.bin"), B, T, 37)


def test_mean_loss_is_the_mean_over_the_first_batches(model, batches):
    losses = []
    for _ in range(2):
        batches.next_batch()
        model.forward(batches.inputs)
        losses += model.compute_losses(batches.targets).tolist()
    assert mean_loss(model, batches, 2) == pytest.approx(np.mean(losses), rel=1e-6)


def test_count_minus_1_takes_each_batch_once_and_more_wrap_around(model, batches):
    assert mean_loss(model, batches, -1) == mean_loss(model, batches, 3)
    assert mean_loss(model, batches, 6) == pytest.approx(mean_loss(model, batches, 3), rel=1e-12)
