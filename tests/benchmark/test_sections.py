import contextlib
from types import SimpleNamespace

import pytest
from support.benchmark_inputs import CEILINGS, ignore, make_job

from llmc_cli.benchmark import sections
from llmc_cli.benchmark.sections import measure_section
from llmc_cli.errors import MissingError


def test_train_section_has_a_step_and_its_operations():
    result = measure_section(make_job("train"), CEILINGS, False, ignore)
    step, *parts = result.rows
    assert step.name == "train/step"
    assert step.runs == 2
    assert step.ceiling == "MFU"
    assert step.tokens_per_s == pytest.approx(16 / step.seconds)
    assert step.share == pytest.approx(step.flops_per_s / CEILINGS.flops)
    assert {"train/step/adamw", "train/step/other"} < {part.name for part in parts}
    assert [part.seconds for part in parts[:-1]] == sorted((part.seconds for part in parts[:-1]), reverse=True)
    assert [worker.implementation for worker in result.workers] == ["llmc"]
    assert result.workers[0].configuration["threads"] == 1
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
