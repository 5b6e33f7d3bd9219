"""PyTorch's workloads, run with an installed PyTorch."""

import contextlib
import re

import numpy as np
import pytest
from support.benchmark_inputs import CEILINGS, CONFIG, ignore, make_job

from llmc_cli.benchmark import interleave, sections
from llmc_cli.benchmark.sections import measure_section
from llmc_cli.errors import MissingError
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.models.layout import parameter_count

pytestmark = pytest.mark.witness


def test_torch_is_measured_on_every_operation_with_an_equivalent(monkeypatch):
    monkeypatch.setattr(interleave, "PAUSE_S", 0)
    measured = measure_section(make_job("kernels"), CEILINGS, True, ignore)
    alone = {row.name for row in measured.rows if not row.torch}
    assert alone == {"kernels/attention_cached", "kernels/embedding_backward"}
    assert measured.unavailable == {}


def test_every_equivalent_is_named_after_an_operation():
    from llmc_cli.benchmark.torch_workloads import KernelsWorkload

    public = {name for name in vars(KernelsWorkload) if not name.startswith("_")}
    assert public - {"prepare"} <= set(OPERATIONS)


@pytest.mark.parametrize("section", ["train", "sample"])
def test_torch_modes_are_measured_or_reported_absent(monkeypatch, section):
    """Only the compiled mode may be absent, if there is no compiler."""
    monkeypatch.setitem(sections.WARMUP_ROUNDS, section, 1)
    measured = measure_section(make_job(section), CEILINGS, True, ignore)
    first = measured.rows[0]
    assert "torch eager" in first.torch
    modes = set(sections.TORCH_MODES[section])
    assert modes == set(first.torch) | set(measured.unavailable)
    assert set(measured.unavailable) <= {"torch compiled"}
    assert first.ratios[first.best_mode] == min(first.torch.values()) / first.seconds
    configuration = measured.workers[1].configuration
    assert configuration["threads"] == 1
    assert configuration["precision"] == "fp32"
    assert configuration["optimizer"] == "AdamW, fused"
    assert all(worker.peak_memory for worker in measured.workers)


@pytest.mark.parametrize(
    ("built", "reason"),
    [(None, "built without CUDA"), ("13.0", "it is built for CUDA 13.0, which may require a newer driver")],
)
def test_missing_gpu_is_an_error(monkeypatch, built, reason):
    import torch

    from llmc_cli.benchmark.torch_workloads import open_torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    with pytest.raises(MissingError, match=rf"^PyTorch {re.escape(torch.__version__)} finds no CUDA device: {reason}"):
        open_torch(make_job("train", implementation="torch eager", device="cuda:0", precision="bf16"))


def test_sampling_tasks_use_the_precision_of_llmc_if_shared(monkeypatch):
    import torch

    from llmc_cli.benchmark.torch_workloads import open_torch

    for precision, uses_bf16 in (("fp32", False), ("fp32 bf16", True)):
        workload, _ = open_torch(make_job("sample", implementation="torch eager", precision=precision))
        dtypes = {}
        for name in workload.tasks:
            task = workload.prepare(name)
            task.run()
            dtypes[name] = task.run.__self__.keys[0].dtype
        bf16 = torch.bfloat16 if uses_bf16 else torch.float32
        assert dtypes == {"token fp32": torch.float32, "token bf16": bf16, "token int8": torch.float32}


@pytest.mark.parametrize("section", ["kernels", "train"])
def test_torch_in_bf16_runs_under_autocast(section):
    import torch

    from llmc_cli.benchmark.torch_workloads import KernelsWorkload, open_torch

    workload, configuration = open_torch(make_job(section, implementation="torch eager", precision="bf16"))
    assert configuration["precision"] == "bf16"
    for name in workload.tasks:
        workload.prepare(name).run()
    if section == "train":
        assert all(parameter.dtype == torch.float32 for parameter in workload.parameters)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        workload = KernelsWorkload(CONFIG, 2, 8, precision)
        name, sizes = workload._uses["linear_forward attproj"]
        assert workload.linear_forward(name, sizes)().dtype == dtype


def test_torch_model_has_the_parameters_and_learns():
    import torch

    from llmc_cli.benchmark.torch_gpt2 import GPT2
    from llmc_cli.benchmark.torch_workloads import TrainWorkload

    torch.manual_seed(0)
    padding = (CONFIG.padded_vocab_size - CONFIG.vocab_size) * CONFIG.channels
    assert sum(p.numel() for p in GPT2(CONFIG).parameters()) == parameter_count(CONFIG) - padding
    workload = TrainWorkload(CONFIG, 2, 8, mode=None)
    losses = [workload.step()["loss"] for _ in range(4)]
    assert losses[0] == pytest.approx(np.log(67), rel=0.05)
    assert losses[-1] < losses[0]


def caches(B, T):
    import torch

    shape = (B, CONFIG.num_heads, T, CONFIG.head_size)
    return ([torch.zeros(shape) for _ in range(CONFIG.num_layers)] for _ in range(2))


@pytest.mark.usefixtures("requires_gxx")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised within PyTorch
def test_compiled_decoding_copies_no_cache():
    """The compiled code allocates no array of a cache's shape."""
    import torch
    from torch._inductor.utils import run_and_get_code

    from llmc_cli.benchmark.torch_gpt2 import GPT2

    model, (keys, values) = GPT2(CONFIG).eval(), caches(1, 13)
    ids, position = torch.zeros((1, 1), dtype=torch.int64), torch.tensor([5])
    with torch.inference_mode():
        _, (code,) = run_and_get_code(torch.compile(model.extend), ids, keys, values, position)
    shapes = re.findall(r"empty_strided_cpu\(\(([\d, ]*)\)", code)
    assert shapes
    assert not {"1, 2, 13, 8", "2, 1, 2, 13, 8"} & set(shapes)
    for layer in (*keys, *values):
        assert layer[:, :, 5].any()
        assert not layer[:, :, 6:].any()


def test_first_requested_precision_is_compiled_on_open(monkeypatch):
    import torch

    from llmc_cli.benchmark.torch_workloads import open_torch

    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32 bf16", torch.float32)):
        workload, _ = open_torch(make_job("sample", implementation="torch compiled", precision=precision))
        assert list(workload._samplers) == [dtype]


def test_release_empties_the_cache_and_resets_the_peak(monkeypatch):
    import torch

    from llmc_cli.benchmark import torch_workloads

    order = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: order.append(name))
    torch_workloads.release()
    assert order == ["empty_cache", "reset_peak_memory_stats"]


def test_decoding_with_a_cache_equals_a_full_forward_pass():
    import torch

    from llmc_cli.benchmark.torch_gpt2 import GPT2

    torch.manual_seed(0)
    model, T = GPT2(CONFIG).eval(), 6
    ids = torch.randint(CONFIG.vocab_size, (2, T))
    keys, values = caches(2, 9)
    with torch.inference_mode():
        total = 0.0
        for t in range(T - 1):
            logits = model.extend(ids[:, t : t + 1], keys, values, torch.tensor([t]))
            total += torch.nn.functional.cross_entropy(logits, ids[:, t + 1]).item()
        assert total / (T - 1) == pytest.approx(model(ids[:, :-1], ids[:, 1:]).item(), rel=1e-5)


GPU = "meta"
"""Stands in for a GPU: PyTorch's device whose tensors have shapes but no data."""


@pytest.fixture
def gpu_calls(monkeypatch):
    """Make the meta device pass for a GPU; return the autocast contexts entered and the number of synchronizations.

    Fused AdamW and ``item``, which the meta device lacks, are replaced.
    """
    import torch

    from llmc_cli.benchmark import torch_workloads

    calls = {"autocast": set(), "waits": 0}

    def autocast(kind, dtype, enabled):
        calls["autocast"].add((kind, dtype, enabled))
        return contextlib.nullcontext()

    def wait(device):
        assert device == GPU
        calls["waits"] += 1

    original = torch.optim.AdamW

    def adamw(*arguments, fused, **options):
        assert fused
        return original(*arguments, **options)

    monkeypatch.setattr(torch_workloads, "is_cuda", lambda device: device == GPU)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    monkeypatch.setattr(torch, "autocast", autocast)
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    before = torch.get_float32_matmul_precision()
    yield calls
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("section", "precision", "matmul_precision"),
    [
        ("kernels", "bf16", "highest"),
        ("train", "fp32", "highest"),
        ("train", "tf32", "high"),
        ("train", "bf16", "highest"),
        ("sample", "fp32 bf16", "highest"),
    ],
)
def test_workloads_run_on_the_gpu(gpu_calls, section, precision, matmul_precision):
    """Every tensor of every operation is on the GPU, and each run ends with a synchronization."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from llmc_cli.benchmark.torch_workloads import open_torch

    dtypes = set()

    class CheckDevice(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for each in tree_leaves((args, kwargs, out)):
                if isinstance(each, torch.Tensor) and each.dim():  # scalars may be on the host
                    assert each.device.type == GPU, function
                    dtypes.add(each.dtype)
            return out

    with CheckDevice():
        workload, configuration = open_torch(
            make_job(section, implementation="torch eager", device=GPU, precision=precision)
        )
        assert gpu_calls["waits"] == 0
        for count, name in enumerate(workload.tasks):
            workload.prepare(name).run()
            assert gpu_calls["waits"] == count + 1
    assert torch.get_float32_matmul_precision() == matmul_precision
    assert configuration["precision"] == precision
    assert configuration["blas"] == "cuBLAS"
    uses_bf16 = precision != "fp32" and precision != "tf32"
    if section != "sample":
        assert gpu_calls["autocast"] == {(GPU, torch.bfloat16, uses_bf16)}
    assert (torch.bfloat16 in dtypes) == (
        uses_bf16 and section != "train"
    )  # in training only autocast creates bf16 tensors
