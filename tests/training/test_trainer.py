import dataclasses
import json
import math
import tracemalloc

import numpy as np
import pytest

from llmc_cli.errors import CheckError, MissingError, UsageError
from llmc_cli.formats.shard import write_shard
from llmc_cli.formats.train_state import check_train_state, load_moments
from llmc_cli.training.reports import CheckpointReport, SampleReport, StepReport, ValidationReport
from llmc_cli.training.trainer import Training


def run(options, backend, stop_after=None):
    """All reports of a run, which is asked to stop after an update."""
    training = Training(options, backend)
    reports = []
    for report in training.run():
        reports.append(report)
        if isinstance(report, StepReport) and report.step == stop_after:
            training.stop()
    return reports


def steps(reports):
    return [report for report in reports if isinstance(report, StepReport)]


def course(reports):
    """What a run did, without the times it took."""
    return [
        dataclasses.astuple(dataclasses.replace(report, ms=0, tokens_per_s=0, mfu=0))
        for report in reports
        if isinstance(report, StepReport)
    ]


def files(folder):
    """The bytes of everything in a run's folder but what tells of time."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".bin" or path.name.startswith("DONE") or path.name == "main.log"
    }


def test_the_loss_falls(but, backend):
    reports = run(but(overfit=True, steps=60, skip_loss_z=0, skip_grad_z=0), backend)
    losses = [report.loss for report in steps(reports)]
    assert losses[0] == pytest.approx(np.log(67), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_resume_is_bit_exact(but, backend, tmp_path):
    whole = run(but(out=tmp_path / "whole"), backend)
    first = run(but(out=tmp_path / "cut"), backend, stop_after=10)
    assert [r.step for r in first if isinstance(r, CheckpointReport)] == [10]
    second = run(but(out=tmp_path / "cut", resume=True), backend)
    assert course(first) + course(second) == course(whole)
    (tmp_path / "cut" / "DONE_00000010").unlink()
    for kind in ("model_{}.bin", "state_{}_00000.bin"):
        (tmp_path / "cut" / kind.format("00000010")).unlink()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_resume_carries_the_detectors_over(but, backend, tmp_path):
    whole = run(but(out=tmp_path / "whole", steps=150), backend)
    assert any(report.skipped for report in steps(whole)[140:])
    run(but(out=tmp_path / "cut", steps=150), backend, stop_after=140)
    second = run(but(out=tmp_path / "cut", steps=150, resume=True), backend)
    assert course(second) == course(whole)[140:]


def test_a_skipped_update_changes_nothing_but_the_count(but, backend, tmp_path):
    reports = steps(run(but(out=tmp_path / "out", steps=150, checkpoint_every=1), backend))
    skipped = next(report.step for report in reports if report.skipped)
    read = lambda step: (tmp_path / "out" / f"model_{step:08d}.bin").read_bytes()  # noqa: E731
    assert read(skipped) == read(skipped - 1)
    assert read(skipped - 1) != read(skipped - 2)


def test_resume_without_a_checkpoint_starts_fresh(but, backend, tmp_path):
    assert course(run(but(out=tmp_path / "a", resume=True), backend)) == course(run(but(out=tmp_path / "b"), backend))


def test_resume_of_a_finished_run_does_nothing(tiny_options, backend):
    run(tiny_options, backend)
    before = files(tiny_options.out)
    assert run(dataclasses.replace(tiny_options, resume=True), backend) == []
    assert files(tiny_options.out) == before


def test_logs_are_cut_back_to_the_resumed_step(but, backend, tmp_path):
    run(but(out=tmp_path / "out", checkpoint_every=8), backend, stop_after=12)
    for name in ("DONE_00000012", "model_00000012.bin", "state_00000012_00000.bin"):
        (tmp_path / "out" / name).unlink()
    run(but(out=tmp_path / "out", checkpoint_every=8, resume=True), backend)
    whole = run(but(out=tmp_path / "whole", checkpoint_every=8), backend)
    assert (tmp_path / "out" / "main.log").read_text() == (tmp_path / "whole" / "main.log").read_text()
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "loss" in event] == list(range(1, 21))
    assert [event["step"] for event in events if "val_loss" in event] == [0, 5, 10, 15, 20]
    assert [event["loss"] for event in events if "loss" in event] == [report.loss for report in steps(whole)]


def test_main_log_is_the_c_trainers(tiny_options, backend):
    reports = run(tiny_options, backend)
    lines = (tiny_options.out / "main.log").read_text().splitlines()
    first, validation = steps(reports)[0], next(r for r in reports if isinstance(r, ValidationReport))
    assert lines[0] == f"s:0 tel:{validation.val_loss:.4f}"
    assert lines[1] == f"s:0 trl:{first.loss:.4f} lr:{first.lr:.6f} norm:{first.norm:.2f}"


def test_a_fresh_run_does_not_overwrite_an_old_one(tiny_options, backend):
    run(tiny_options, backend)
    with pytest.raises(UsageError, match=r"holds a finished checkpoint \(step 20\)"):
        Training(tiny_options, backend)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 1e-3}, "--lr was 0.01, is 0.001"),
        ({"steps": 30}, "--steps was 20, is 30"),
        ({"seed": 1}, "--seed"),
        ({"batch": 1}, "--batch was 2, is 1"),
        ({"schedule": "linear"}, "--schedule"),
        ({"data": "val"}, "the training data is another"),
    ],
)
def test_resume_refuses_another_course(but, backend, tiny_data, change, text):
    run(but(), backend, stop_after=3)
    if change.get("data"):
        change = {"data": str(tiny_data / "tiny_train_0.bin")}
    with pytest.raises(UsageError, match=text):
        Training(but(resume=True, **change), backend)


def test_force_changes_the_course(but, backend):
    run(but(), backend, stop_after=3)
    reports = steps(run(but(resume=True, force=True, steps=22, lr=1e-3), backend))
    assert [report.step for report in reports] == list(range(4, 23))
    assert Training(but(resume=True, steps=22, lr=1e-3), backend).first_step == 22


def test_resume_with_another_batch_by_force(but, backend):
    run(but(), backend, stop_after=3)
    with pytest.raises(UsageError, match="fits neither the shards"):
        run(but(resume=True, force=True, batch=1), backend)


def test_checkpoints_and_how_many_are_kept(but, backend, tmp_path):
    run(but(checkpoint_every=2, keep=2, major_every=6), backend)
    done = sorted(path.name for path in (tmp_path / "out").glob("DONE_*"))
    assert done == [f"DONE_{step:08d}" for step in (6, 12, 18, 20)]
    assert len(list((tmp_path / "out").glob("*.bin"))) == 2 * len(done)
    assert list(json.loads((tmp_path / "out" / "run.json").read_text())["checkpoints"])[-1] == "20"


def test_a_run_without_a_folder_keeps_nothing(but, backend, tmp_path):
    before = set(tmp_path.iterdir())
    assert len(steps(run(but(out=None), backend))) == 20
    assert set(tmp_path.iterdir()) == before


def test_a_crash_while_writing_leaves_the_last_checkpoint(but, backend, monkeypatch):
    from llmc_cli.training import checkpoints

    whole = course(run(but(out=None), backend))
    write = checkpoints.write_train_state

    def fail(path, *arguments):
        if "00000010" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(checkpoints, "write_train_state", fail)
    with pytest.raises(OSError, match="No space"):
        run(but(checkpoint_every=5), backend)
    monkeypatch.setattr(checkpoints, "write_train_state", write)
    assert course(run(but(checkpoint_every=5, resume=True), backend)) == whole[5:]


def test_a_loss_that_is_not_finite_stops_the_run(but, backend, tmp_path):
    options = but(checkpoint_every=4, lr=1e-2, schedule="constant")
    training = Training(options, backend)
    with pytest.raises(CheckError, match=r"step 7: loss nan.*last good checkpoint is .*model_00000004\.bin"):
        for report in training.run():
            if isinstance(report, StepReport) and report.step == 6:
                training.model.params["lnfw"][0] = np.nan
    assert sorted(path.name for path in (tmp_path / "out").glob("DONE_*")) == ["DONE_00000004"]
    assert "nan" not in (tmp_path / "out" / "main.log").read_text()


def test_a_validation_loss_that_is_not_finite_stops_the_run(but, backend, tmp_path):
    training = Training(but(checkpoint_every=5), backend)
    with pytest.raises(
        CheckError, match=r"step 10: validation loss nan.*last good checkpoint is .*model_00000005\.bin"
    ):
        for report in training.run():
            if isinstance(report, StepReport) and report.step == 10:
                training.model.params["lnfw"][0] = np.nan
    assert sorted(path.name for path in (tmp_path / "out").glob("DONE_*")) == ["DONE_00000005"]
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_no_checkpoint_of_what_is_not_finite(but, backend, tmp_path, what):
    training = Training(but(checkpoint_every=4, val_every=0), backend)
    with pytest.raises(CheckError, match=r"step 8: weights or moments: not finite.*model_00000004\.bin"):
        for report in training.run():
            if isinstance(report, StepReport) and report.step == 8:
                (training.model.params["wpe"] if what == "weight" else training.optimizer.v)[3] = np.inf
    assert not (tmp_path / "out" / "model_00000008.bin").exists()


def test_an_interrupt_does_not_wait_for_validation_and_samples(but, backend):
    options = but(val_every=1, sample_every=1, sample_tokens=4)
    reports = run(options, backend, stop_after=3)
    assert [type(report) for report in reports[-2:]] == [StepReport, CheckpointReport]
    again = run(dataclasses.replace(options, resume=True), backend, stop_after=4)
    assert [report.step for report in again if isinstance(report, ValidationReport)] == [3]


def test_an_interrupt_of_validation_takes_no_further_step(but, backend):
    training = Training(but(val_every=1), backend)
    reports = []
    for report in training.run():
        reports.append(report)
        if isinstance(report, ValidationReport) and report.step == 2:
            training.stop()
    assert (type(reports[-1]), reports[-1].step) == (CheckpointReport, 2)


def test_the_folder_is_locked(tiny_options, backend):
    training = Training(tiny_options, backend).run()
    next(training)
    with pytest.raises(UsageError, match="another run is using this folder"):
        run(tiny_options, backend)
    training.close()
    run(tiny_options, backend)


def test_validation_goes_round_as_the_c_trainers(but, backend):
    """300 tokens hold 9 batches of 2 x 16 and fill 9.4: -1 takes 9, and 18 are the same twice."""
    losses = [next(iter(run(but(out=None, steps=1, val_steps=count), backend))).val_loss for count in (-1, 9, 18)]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-12)


def test_default_length_is_one_epoch(but, backend):
    assert Training(but(steps=None), backend).steps == 1200 // 64


def test_overfit_uses_the_first_batch_again(but, backend):
    reports = steps(run(but(overfit=True, total_batch=None, schedule="constant", lr=0.0), backend))
    assert len({report.loss for report in reports}) == 1


def test_overfit_takes_the_validation_data(but, backend, tiny_data):
    validation = str(tiny_data / "tiny_val_*.bin")
    options = but(out=None, total_batch=None, steps=1, data=str(tiny_data / "nothing_*.bin"), overfit=True)
    first = steps(run(options, backend))
    assert (
        first[0].loss
        == steps(run(but(out=None, total_batch=None, steps=1, data=validation, shuffle=False), backend))[0].loss
    )
    assert Training(dataclasses.replace(options, steps=None), backend).steps == 300 // 32


@pytest.mark.parametrize("master_weights", [True, False])
def test_the_state_holds_the_weights_that_the_c_trainer_asks_for(but, backend, master_weights):
    options = but(steps=2, master_weights=master_weights)
    run(options, backend)
    path = options.out / "state_00000002_00000.bin"
    state, size = check_train_state(path)
    assert state.has_master == master_weights
    if master_weights:
        m, v, master = np.zeros((3, size), np.float32)
        load_moments(path, state, m, v, master)
        parameters = (options.out / "model_00000002.bin").read_bytes()[1024:]
        assert master.tobytes() == parameters


def test_accumulation_is_the_larger_batch(but, backend):
    # four sequences in order as one batch, and as two micro-batches of two
    one = steps(run(but(out=None, shuffle=False, batch=4, total_batch=64), backend))
    two = steps(run(but(out=None, shuffle=False, batch=2, total_batch=64), backend))
    for a, b in zip(one[:5], two[:5], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.norm == pytest.approx(b.norm, rel=1e-3)


def test_samples(but, backend):
    reports = run(but(out=None, sample_every=10, sample_tokens=8), backend)
    samples = [report for report in reports if isinstance(report, SampleReport)]
    assert [report.step for report in samples] == [10, 20]
    assert all(len(report.ids) == 7 and max(report.ids) < 67 for report in samples)


def test_zero_means_never(but, backend):
    reports = run(but(out=None, val_every=0, val_data="nowhere"), backend)
    assert all(isinstance(report, StepReport) for report in reports)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"total_batch": 50}, "not a multiple of batch x sequence length = 32"),
        ({"total_batch": 0}, "not a multiple of batch x sequence length = 32"),
        ({"seq_len": 33}, "has 32 positions"),
        ({"model": "d7"}, "unknown model 'd7'"),
        ({"schedule": "cos"}, "there are cosine"),
        ({"out": None, "resume": True}, "--resume needs --out"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"val_steps": 0}, "--val-steps 0"),
        ({"steps": None, "total_batch": 3200}, "less than one step takes"),
    ],
)
def test_wrong_options(but, backend, change, text):
    with pytest.raises(UsageError, match=text):
        Training(but(**change), backend)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", math.nan), ("lr", math.inf), ("lr", -1e-3), ("lr_final", math.nan), ("weight_decay", math.nan),
        ("beta1", 1.0), ("beta1", -0.1), ("beta2", 1.0), ("eps", 0.0), ("eps", 1e-50), ("clip", math.nan),
        ("clip", 1e200), ("skip_loss_z", math.nan), ("skip_grad_z", -1.0),
    ],
)  # fmt: skip
def test_what_would_give_no_numbers(but, name, value):
    with pytest.raises(UsageError, match=rf"--{name.replace('_', '-')} \S+: expected"):
        but(**{name: value})


def test_a_model_larger_than_the_machine(but, backend):
    with pytest.raises(MissingError, match=r"takes .* GB of memory, and this machine has"):
        Training(but(model="gpt3:c12288"), backend)


def test_the_plan_counts_the_arenas(but, backend):
    training = Training(but(out=None), backend)
    list(training.run())
    model, optimizer, plan = training.model, training.optimizer, training.plan
    assert plan.memory["parameters"] == model.params.flat.nbytes
    assert plan.memory["gradients"] == model.grads.flat.nbytes
    assert plan.memory["moments"] == optimizer.m.nbytes + optimizer.v.nbytes
    assert plan.memory["activations"] == model.acts.flat.nbytes + model.stats.flat.nbytes
    assert plan.memory["workspace"] >= model.scratch.flat.nbytes


def test_nothing_is_allocated_in_a_step(but, backend):
    """Measured: NumPy and Python tell tracemalloc of each allocation, numba counts its own."""
    from numba.core.runtime import _nrt_python, rtsys

    _nrt_python.memsys_enable_stats()
    options = but(out=None, val_every=0, seq_len=32, batch=15, total_batch=960)
    training = Training(options, backend)
    reports = training.run()
    for _ in range(3):
        next(reports)
    before = rtsys.get_allocation_stats()
    tracemalloc.start()
    try:
        next(reports)
        tracemalloc.reset_peak()
        base, _ = tracemalloc.get_traced_memory()
        for _ in range(5):
            next(reports)
        end, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    after = rtsys.get_allocation_stats()
    # what comes and goes are numbers, views and the reports: less than the smallest array with a row per token
    assert peak - base < training.model.acts["encoded"].nbytes
    assert end - base < 4096
    assert after.alloc - before.alloc == after.free - before.free


def test_the_model_learns_what_only_attention_can(tmp_path, backend, but):
    """Sequences whose second half repeats a random first half: without attention the loss there is ln 64 = 4.16."""
    half = 16
    generator = np.random.default_rng(0)

    def sequences(count):
        first = generator.integers(0, 64, (count, half))
        return np.concatenate([np.full((count, 1), 64), first, first], axis=1)[:, : 2 * half]

    # a sample is B·T+1 tokens from a multiple of B·T: sequences of exactly T tokens stay whole
    write_shard(tmp_path / "copy_train.bin", np.append(sequences(40_000).reshape(-1), 64))
    options = but(
        out=None, data=str(tmp_path / "copy_train.bin"), val_every=0, batch=32, seq_len=2 * half, total_batch=None,
        steps=None, lr=3e-3, warmup=50, weight_decay=0.0, skip_loss_z=0, skip_grad_z=0, clip=1.0,
        model=str(tmp_path / "copy.json"),
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "copy.json").write_text(json.dumps({**config, "n_embd": 64, "n_head": 4}))
    training = Training(options, backend)
    for _ in training.run():
        pass
    fresh = sequences(32).astype(np.int32)
    targets = np.roll(fresh, -1, axis=1).astype(np.int32)
    targets[:, :half] = -1  # the first half cannot be known
    targets[:, -1] = -1
    training.model.forward(fresh)
    losses = training.model.compute_losses(targets)
    assert float(losses.sum()) / (targets >= 0).sum() < 0.1
