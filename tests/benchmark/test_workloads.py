from collections import Counter

import numpy as np
import pytest
from support.benchmark_inputs import CONFIG
from support.cuda_recording_device import RecordingDevice

from llmc_cli.benchmark.workloads import KernelsWorkload, SampleWorkload, TrainWorkload
from llmc_cli.kernels.backend import open_sampling
from llmc_cli.kernels.cuda.kernels import CudaKernels
from llmc_cli.kernels.operation import Cost
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.models.layout import parameter_count


def test_kernels_workload_runs_every_operation(backend):
    workload = KernelsWorkload(backend.kernels, CONFIG, 2, 8)
    assert {task.split()[0] for task in workload.tasks} == set(OPERATIONS)
    for name in workload.tasks:
        task = workload.prepare(name)
        for _ in range(2):
            task.run()
        assert min(task.cost) > 0, name


def test_train_workload_trains_and_splits_a_step(backend):
    workload = TrainWorkload(backend.kernels, CONFIG, 2, 8)
    step = workload.prepare("step")
    first = step.run()
    assert first["loss"] == pytest.approx(np.log(67), rel=0.05)
    assert first["norm"] > 0
    split = workload.prepare("split").run()
    assert {"head_loss", "linear_backward", "adamw", "sum_squares"} < set(split)
    assert split["residual_norm_forward"]["calls"] == 2 * CONFIG.num_layers + 1
    assert split["adamw"]["calls"] == 1
    for _ in range(3):
        assert workload.step()["loss"] < first["loss"]
    assert step.cost.flops == 16 * (6 * parameter_count(CONFIG) + 6 * 2 * 16 * 8)


def test_train_workload_prefetches_the_next_batch():
    """A step uses the batch that has been prefetched and uploads only the next one."""
    device = RecordingDevice(True, 80)
    workload = TrainWorkload(CudaKernels(device, "bf16"), CONFIG, 2, 8)
    workload.prefetch()
    device.copies.clear()
    workload.step()
    assert Counter(device.copies) == {"upload": 3, "copy": 2, "download": 2}  # a batch, and the optimizer's scalars


def test_sample_workload_costs_the_stored_bytes_of_weights(backend):
    bf16 = open_sampling("cpu", "bf16", 1).kernels
    workload = SampleWorkload({"fp32": backend.kernels, "bf16": bf16}, CONFIG, 2, 14)
    assert workload.tasks == ("token fp32", "token bf16")
    matrices = 2 * 12 * 16 * 16  # two layers
    head = CONFIG.padded_vocab_size * 16
    full, half = (workload.prepare(task) for task in workload.tasks)
    assert full.cost == Cost(2 * 2 * (matrices + head), 4 * (matrices + head))
    padded = 2 * (3 * 16 + 16 + 4 * 16 + 16) * 64 + CONFIG.padded_vocab_size * 64  # rows are padded to 64 elements
    assert half.cost == Cost(full.cost.flops, 2 * padded)
    assert full.parts == half.parts == 2  # the context has room for two tokens
    for task in (full, half, full):
        task.run()
