"""Live PyTorch at the same work."""

import numpy as np
import pytest
from benchmark_inputs import CEILINGS, CONFIG, quiet, work

from llmc_cli import contest, measuring
from llmc_cli.measuring import measure
from llmc_cli.models.layout import parameter_count

pytestmark = pytest.mark.witness


def test_torch_takes_turns_at_the_same_operations(monkeypatch):
    monkeypatch.setattr(contest, "SETTLE_S", 0)
    measured = measure(work("kernels"), CEILINGS, True, quiet)
    alone = {row.name for row in measured.rows if not row.torch}
    assert alone == {"kernels/attention_cached", "kernels/embedding_backward"}
    assert measured.absent == {}


@pytest.mark.parametrize("section", ["train", "sample"])
def test_torch_takes_turns(monkeypatch, section):
    """Compiled as well, where there is a compiler; where there is none, that is said."""
    monkeypatch.setitem(measuring.WARM_UP, section, 1)
    measured = measure(work(section), CEILINGS, True, quiet)
    first = measured.rows[0]
    assert "torch eager" in first.torch
    modes = set(measuring.TORCH_MODES[section])
    assert modes == set(first.torch) | set(measured.absent)
    assert set(measured.absent) <= {"torch compiled"}
    assert first.ratios[first.best_mode] == min(first.torch.values()) / first.seconds
    configuration = measured.sides[1].configuration
    assert configuration["threads"] == 1
    assert configuration["precision"] == "fp32"
    assert configuration["optimizer"] == "AdamW, fused"
    assert all(side.peak_memory for side in measured.sides)


@pytest.mark.parametrize("section", ["kernels", "train"])
def test_torch_in_bf16_runs_under_autocast(section):
    import torch

    from llmc_cli.torch_workloads import KernelsWorkload, open_torch

    made, configuration = open_torch(work(section, side="torch eager", precision="bf16"))
    assert configuration["precision"] == "bf16"
    for name in made.tasks:
        made.prepare(name).run()
    if section == "train":
        assert all(parameter.dtype == torch.float32 for parameter in made.parameters)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        workload = KernelsWorkload(CONFIG, 2, 8, precision)
        assert workload._forward(*workload._linear(16, 16))().dtype == dtype


def test_torchs_model_is_the_same_model():
    import torch

    from llmc_cli.torch_workloads import GPT2, TrainWorkload

    torch.manual_seed(0)
    padding = (CONFIG.padded_vocab_size - CONFIG.vocab_size) * CONFIG.channels
    assert sum(p.numel() for p in GPT2(CONFIG).parameters()) == parameter_count(CONFIG) - padding
    workload = TrainWorkload(CONFIG, 2, 8, compiled=False)
    losses = [workload.step()["loss"] for _ in range(4)]
    assert losses[0] == pytest.approx(np.log(67), rel=0.05)
    assert losses[-1] < losses[0]


def test_torchs_cached_step_agrees_with_its_whole_pass():
    import torch

    from llmc_cli.torch_workloads import GPT2

    torch.manual_seed(0)
    model, T = GPT2(CONFIG).eval(), 6
    ids = torch.randint(CONFIG.vocab_size, (2, T))
    shape = (CONFIG.num_layers, 2, CONFIG.num_heads, 9, CONFIG.head_size)
    keys, values = torch.zeros(shape), torch.zeros(shape)
    with torch.inference_mode():
        total = 0.0
        for t in range(T - 1):
            logits = model.extend(ids[:, t : t + 1], keys, values, torch.tensor([t]))
            total += torch.nn.functional.cross_entropy(logits, ids[:, t + 1]).item()
        assert total / (T - 1) == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item(), rel=1e-5)
