"""Ceilings, our workloads, and rows made of what they take; never how fast this machine is."""

import contextlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from support.benchmark_inputs import CEILINGS, CONFIG, ignore, make_job
from support.cuda_notebook import Notebook

from llmc_cli.benchmark import sections
from llmc_cli.benchmark.ceilings import memory_bandwidth
from llmc_cli.benchmark.sections import measure_section
from llmc_cli.benchmark.workloads import KernelsWorkload, SampleWorkload, TrainWorkload
from llmc_cli.errors import MissingError
from llmc_cli.kernels.backend import open_sampling
from llmc_cli.kernels.cuda.kernels import CudaKernels
from llmc_cli.kernels.operation import Cost
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.peak import matmul_flops
from llmc_cli.models.layout import parameter_count


def test_ceilings_are_measured(backend):
    assert matmul_flops(backend.kernels, 16, 16, 16) > 0
    found = memory_bandwidth(backend.kernels, 2, 1 << 10)
    assert list(found) == ["read", "copy", "update"]
    assert min(found.values()) > 0


def test_kernels_workload_covers_every_operation_and_runs(backend):
    workload = KernelsWorkload(backend.kernels, CONFIG, 2, 8)
    assert {task.split()[0] for task in workload.tasks} == set(OPERATIONS)
    for name in workload.tasks:
        task = workload.prepare(name)
        for _ in range(2):
            task.run()
        assert min(task.cost) > 0, name


def test_train_workload_makes_the_trainers_steps(backend):
    workload = TrainWorkload(backend.kernels, CONFIG, 2, 8)
    step = workload.prepare("step")
    first = step.run()
    assert first["loss"] == pytest.approx(np.log(67), rel=0.05)
    assert first["norm"] > 0
    split = workload.prepare("split").run()
    assert {"head_loss", "linear_backward", "adamw", "sum_squares"} < set(split)
    assert split["residual_norm_forward"]["calls"] == 2 * CONFIG.num_layers + 1
    for _ in range(3):
        assert workload.step()["loss"] < first["loss"]
    assert step.cost.flops == 16 * (6 * parameter_count(CONFIG) + 6 * 2 * 16 * 8)


def test_train_workload_sends_the_next_batch_ahead():
    """And what was sent is what the next step takes."""
    device = Notebook(True, 80)
    workload = TrainWorkload(CudaKernels(device, "bf16"), CONFIG, 2, 8)
    workload.prefetch()
    device.copies.clear()
    workload.step()
    assert Counter(device.copies) == {"upload": 3, "copy": 2, "download": 2}  # a batch, and the update's numbers


def test_sample_workload_counts_the_bytes_that_weights_are_kept_in(backend):
    bf16 = open_sampling("cpu", "bf16", 1).kernels
    workload = SampleWorkload({"fp32": backend.kernels, "bf16": bf16}, CONFIG, 2, 14)
    assert workload.tasks == ("token fp32", "token bf16")
    matrices = 2 * 12 * 16 * 16  # two layers
    head = CONFIG.padded_vocab_size * 16
    full, half = (workload.prepare(task) for task in workload.tasks)
    assert full.cost == Cost(2 * 2 * (matrices + head), 4 * (matrices + head))
    padded = 2 * (3 * 16 + 16 + 4 * 16 + 16) * 64 + CONFIG.padded_vocab_size * 64  # rows of 16 and 64 are 64 long
    assert half.cost == Cost(full.cost.flops, 2 * padded)
    assert full.parts == half.parts == 2  # what the context leaves
    for task in (full, half, full):
        task.run()


def test_train_section_has_a_step_and_its_operations():
    measured = measure_section(make_job("train"), CEILINGS, False, ignore)
    step, *parts = measured.rows
    assert step.name == "train/step"
    assert step.runs == 2
    assert step.ceiling == "MFU"
    assert step.tokens_per_s == pytest.approx(16 / step.seconds)
    assert step.share == pytest.approx(step.flops_per_s / CEILINGS.flops)
    assert {"train/step/adamw", "train/step/other"} < {part.name for part in parts}
    assert [part.seconds for part in parts[:-1]] == sorted((part.seconds for part in parts[:-1]), reverse=True)
    assert [worker.implementation for worker in measured.workers] == ["llmc"]
    assert measured.workers[0].configuration["threads"] == 1
    assert not step.torch
    assert step.best_mode == ""


def test_prepro_share_is_relative_to_the_tokenizer():
    files, tokenizer = measure_section(make_job("prepro"), CEILINGS, False, ignore).rows
    assert files.ceiling == "tokenizer"
    assert files.share == pytest.approx(tokenizer.seconds / files.seconds)
    assert files.tokens_per_s > 0


@pytest.mark.parametrize(
    ("section", "precision", "torch_precision"),
    [("train", "bf16", "bf16"), ("kernels", "bf16", "bf16"), ("train", "bf16x3", "fp32"), ("sample", "bf16", "fp32")],
)
def test_torch_uses_the_same_precision_if_supported(monkeypatch, section, precision, torch_precision):
    def open_workers(jobs):
        raise StopIteration([job.precision for job in jobs])

    monkeypatch.setattr(sections, "open_workers", open_workers)
    with pytest.raises(StopIteration) as started:
        measure_section(make_job(section, precision=precision), CEILINGS, True, ignore)
    assert started.value.value[0] == precision
    assert set(started.value.value[1:]) == {torch_precision}


def test_torch_samples_with_cuda_graphs_in_all_precisions_on_a_gpu(monkeypatch):
    def open_workers(jobs):
        raise StopIteration(jobs)

    monkeypatch.setattr(sections, "open_workers", open_workers)
    monkeypatch.setattr(sections, "sampling_precisions", lambda device, precision: ("fp32", "bf16"))
    with pytest.raises(StopIteration) as started:
        measure_section(make_job("sample", device="cuda:0", precision="auto"), CEILINGS, True, ignore)
    assert {job.implementation: job.precision for job in started.value.value} == {
        "llmc": "auto",
        **dict.fromkeys(("torch eager", "torch compiled", "transformers", "torch graphs"), "fp32 bf16"),
    }


def test_error_if_no_torch_mode_is_available(monkeypatch):
    unavailable = {"torch eager": "too old", "torch compiled": "too old", "transformers": "not there"}

    @contextlib.contextmanager
    def open_workers(jobs):
        yield [SimpleNamespace(tasks=())], unavailable

    monkeypatch.setattr(sections, "open_workers", open_workers)
    with pytest.raises(MissingError, match=r"^--against torch: sample: too old; not there$"):
        measure_section(make_job("sample"), CEILINGS, True, ignore)


@pytest.mark.parametrize(
    ("section", "device", "runs"),
    [
        ("train", "cpu", 0),
        ("kernels", "cpu", 1),
        ("train", "cuda:0", 1),
        ("kernels", "cuda:0", 1),
        ("prepro", "cuda:0", 0),
    ],
)
def test_number_of_warmup_runs(section, device, runs):
    count = sections._warmup_runs(make_job(section, device=device))
    assert (count, type(count)) == (runs, int)  # serialized to JSON
