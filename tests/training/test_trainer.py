import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from support.training_runs import course, files, new_trainer, run, steps

from llmc_cli.errors import CheckError, UsageError
from llmc_cli.formats.shard import write_shard
from llmc_cli.formats.train_state import check_train_state, load_moments
from llmc_cli.training.checkpoints import RunFolder
from llmc_cli.training.plan import make_plan
from llmc_cli.training.reports import CheckpointReport, SampleReport, StepReport, ValidationReport


def test_loss_decreases(options_with, backend):
    reports = run(options_with(overfit=True, steps=60, skip_loss_z=0, skip_grad_z=0), backend)
    losses = [report.loss for report in steps(reports)]
    assert losses[0] == pytest.approx(np.log(67), abs=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_resume_is_bit_exact(options_with, backend, tmp_path):
    whole = run(options_with(out=tmp_path / "whole"), backend)
    first = run(options_with(out=tmp_path / "cut"), backend, stop_after=10)
    assert [r.step for r in first if isinstance(r, CheckpointReport)] == [10]
    second = run(options_with(out=tmp_path / "cut", resume=True), backend)
    assert course(first) + course(second) == course(whole)
    (tmp_path / "cut" / "DONE_00000010").unlink()
    for kind in ("model_{}.bin", "state_{}_00000.bin"):
        (tmp_path / "cut" / kind.format("00000010")).unlink()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_resume_restores_the_outlier_detectors(options_with, backend, tmp_path):
    whole = run(options_with(out=tmp_path / "whole", steps=150), backend)
    assert any(report.skipped for report in steps(whole)[140:])
    run(options_with(out=tmp_path / "cut", steps=150), backend, stop_after=140)
    second = run(options_with(out=tmp_path / "cut", steps=150, resume=True), backend)
    assert course(second) == course(whole)[140:]


def test_skipped_update_does_not_change_the_model(options_with, backend, tmp_path):
    reports = steps(run(options_with(out=tmp_path / "out", steps=150, checkpoint_every=1), backend))
    skipped = next(report.step for report in reports if report.skipped)
    read = lambda step: (tmp_path / "out" / f"model_{step:08d}.bin").read_bytes()  # noqa: E731
    assert read(skipped) == read(skipped - 1)
    assert read(skipped - 1) != read(skipped - 2)


def test_resume_without_a_checkpoint_starts_fresh(options_with, backend, tmp_path):
    assert course(run(options_with(out=tmp_path / "a", resume=True), backend)) == course(
        run(options_with(out=tmp_path / "b"), backend)
    )


def test_resuming_a_finished_run_does_nothing(tiny_options, backend):
    run(tiny_options, backend)
    before = files(tiny_options.out)
    assert run(dataclasses.replace(tiny_options, resume=True), backend) == []
    assert files(tiny_options.out) == before


def test_resume_truncates_the_logs(options_with, backend, tmp_path):
    run(options_with(out=tmp_path / "out", checkpoint_every=8), backend, stop_after=12)
    for name in ("DONE_00000012", "model_00000012.bin", "state_00000012_00000.bin"):
        (tmp_path / "out" / name).unlink()
    run(options_with(out=tmp_path / "out", checkpoint_every=8, resume=True), backend)
    whole = run(options_with(out=tmp_path / "whole", checkpoint_every=8), backend)
    assert (tmp_path / "out" / "main.log").read_text() == (tmp_path / "whole" / "main.log").read_text()
    events = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "loss" in event] == list(range(1, 21))
    assert [event["step"] for event in events if "val_loss" in event] == [0, 5, 10, 15, 20]
    assert [event["loss"] for event in events if "loss" in event] == [report.loss for report in steps(whole)]


def test_main_log_has_the_format_of_llm_c(tiny_options, backend):
    reports = run(tiny_options, backend)
    lines = (tiny_options.out / "main.log").read_text().splitlines()
    first, validation = steps(reports)[0], next(r for r in reports if isinstance(r, ValidationReport))
    assert lines[0] == f"s:0 tel:{validation.val_loss:.4f}"
    assert lines[1] == f"s:0 trl:{first.loss:.4f} lr:{first.lr:.6f} norm:{first.norm:.2f}"


def test_force_allows_changed_options(options_with, backend):
    run(options_with(), backend, stop_after=3)
    reports = steps(run(options_with(resume=True, force=True, steps=22, lr=1e-3), backend))
    assert [report.step for report in reports] == list(range(4, 23))
    assert make_plan(options_with(resume=True, steps=22, lr=1e-3), backend).first_step == 22


def test_forced_resume_with_another_batch_is_refused(options_with, backend):
    run(options_with(), backend, stop_after=3)
    with pytest.raises(UsageError, match="does not fit the shards"):
        run(options_with(resume=True, force=True, batch=1), backend)
    RunFolder(options_with().out).lock().release()  # the failed run has released its lock


def test_checkpoint_every_keep_and_major_every(options_with, backend, tmp_path):
    run(options_with(checkpoint_every=2, keep=2, major_every=6), backend)
    done = sorted(path.name for path in (tmp_path / "out").glob("DONE_*"))
    assert done == [f"DONE_{step:08d}" for step in (6, 12, 18, 20)]
    assert len(list((tmp_path / "out").glob("*.bin"))) == 2 * len(done)
    assert list(json.loads((tmp_path / "out" / "run.json").read_text())["checkpoints"])[-1] == "20"


def test_run_without_out_writes_no_files(options_with, backend, tmp_path):
    before = set(tmp_path.iterdir())
    assert len(steps(run(options_with(out=None), backend))) == 20
    assert set(tmp_path.iterdir()) == before


def test_failed_checkpoint_leaves_the_previous_one(options_with, backend, monkeypatch):
    from llmc_cli.training import checkpoints

    whole = course(run(options_with(out=None), backend))
    write = checkpoints.write_train_state

    def fail(path, *arguments):
        if "00000010" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, *arguments)

    monkeypatch.setattr(checkpoints, "write_train_state", fail)
    with pytest.raises(OSError, match="No space"):
        run(options_with(checkpoint_every=5), backend)
    monkeypatch.setattr(checkpoints, "write_train_state", write)
    assert course(run(options_with(checkpoint_every=5, resume=True), backend)) == whole[5:]


def test_non_finite_loss_stops_the_run(options_with, backend, tmp_path):
    options = options_with(checkpoint_every=4, lr=1e-2, schedule="constant")
    trainer = new_trainer(options, backend)
    with pytest.raises(CheckError, match=r"step 7: loss nan.*last good checkpoint is .*model_00000004\.bin"):
        for report in trainer.run():
            if isinstance(report, StepReport) and report.step == 6:
                trainer.model.params["lnfw"][0] = np.nan
    assert sorted(path.name for path in (tmp_path / "out").glob("DONE_*")) == ["DONE_00000004"]
    assert "nan" not in (tmp_path / "out" / "main.log").read_text()


def test_non_finite_validation_loss_stops_the_run(options_with, backend, tmp_path):
    trainer = new_trainer(options_with(checkpoint_every=5), backend)
    with pytest.raises(
        CheckError, match=r"step 10: validation loss nan.*last good checkpoint is .*model_00000005\.bin"
    ):
        for report in trainer.run():
            if isinstance(report, StepReport) and report.step == 10:
                trainer.model.params["lnfw"][0] = np.nan
    assert sorted(path.name for path in (tmp_path / "out").glob("DONE_*")) == ["DONE_00000005"]
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("what", ["weight", "moment"])
def test_non_finite_weights_or_moments_are_not_saved(options_with, backend, tmp_path, what):
    trainer = new_trainer(options_with(checkpoint_every=4, val_every=0), backend)
    with pytest.raises(CheckError, match=r"step 8: weights or moments: not finite.*model_00000004\.bin"):
        for report in trainer.run():
            if isinstance(report, StepReport) and report.step == 8:
                (trainer.model.params["wpe"] if what == "weight" else trainer.optimizer.v)[3] = np.inf
    assert not (tmp_path / "out" / "model_00000008.bin").exists()


def test_interrupted_run_skips_validation_and_samples(options_with, backend):
    options = options_with(val_every=1, sample_every=1, sample_tokens=4)
    reports = run(options, backend, stop_after=3)
    assert [type(report) for report in reports[-2:]] == [StepReport, CheckpointReport]
    again = run(dataclasses.replace(options, resume=True), backend, stop_after=4)
    assert [report.step for report in again if isinstance(report, ValidationReport)] == [3]


def test_interrupt_during_validation_takes_no_further_step(options_with, backend):
    reports = run(options_with(val_every=1), backend, stop_after=2, stop_at=ValidationReport)
    assert (type(reports[-1]), reports[-1].step) == (CheckpointReport, 2)


def test_run_folder_is_locked(tiny_options, backend):
    reports = new_trainer(tiny_options, backend).run()
    next(reports)
    with pytest.raises(UsageError, match="another run is using this directory"):
        run(tiny_options, backend)
    reports.close()
    run(tiny_options, backend)


def test_validation_wraps_around_as_in_llm_c(options_with, backend):
    """The 300 tokens are 9 batches of 2 x 16: -1 evaluates 9, and 18 evaluates each of them twice."""
    losses = [
        next(iter(run(options_with(out=None, steps=1, val_steps=count), backend))).val_loss for count in (-1, 9, 18)
    ]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-12)


def test_overfit_repeats_the_first_batch(options_with, backend):
    reports = steps(run(options_with(overfit=True, total_batch=-1, schedule="constant", lr=0.0), backend))
    assert len({report.loss for report in reports}) == 1


def test_overfit_trains_on_the_validation_data(options_with, backend, tiny_data):
    validation = str(tiny_data / "tiny_val_*.bin")
    options = options_with(out=None, total_batch=-1, steps=1, data=str(tiny_data / "nothing_*.bin"), overfit=True)
    first = steps(run(options, backend))
    assert (
        first[0].loss
        == steps(run(options_with(out=None, total_batch=-1, steps=1, data=validation, shuffle=False), backend))[0].loss
    )
    assert make_plan(dataclasses.replace(options, steps=-1), backend).steps == 300 // 32


@pytest.mark.parametrize("master_weights", [True, False])
def test_master_weights_in_the_training_state(options_with, backend, master_weights):
    options = options_with(steps=2, master_weights=master_weights)
    run(options, backend)
    path = options.out / "state_00000002_00000.bin"
    state, size = check_train_state(path)
    assert state.has_master == master_weights
    if master_weights:
        m, v, master = np.zeros((3, size), np.float32)
        load_moments(path, state, m, v, master)
        parameters = (options.out / "model_00000002.bin").read_bytes()[1024:]
        assert master.tobytes() == parameters


def test_accumulation_equals_a_larger_batch(options_with, backend):
    # four sequences as one batch, and as two micro-batches of two
    one = steps(run(options_with(out=None, shuffle=False, batch=4, total_batch=64), backend))
    two = steps(run(options_with(out=None, shuffle=False, batch=2, total_batch=64), backend))
    for a, b in zip(one[:5], two[:5], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.norm == pytest.approx(b.norm, rel=1e-3)


def test_samples_have_the_requested_length(options_with, backend):
    reports = run(options_with(out=None, sample_every=10, sample_tokens=8), backend)
    samples = [report for report in reports if isinstance(report, SampleReport)]
    assert [report.step for report in samples] == [10, 20]
    assert all(len(report.ids) == 7 and max(report.ids) < 67 for report in samples)


def test_val_every_0_needs_no_validation_data(options_with, backend):
    reports = run(options_with(out=None, val_every=0, val_data="nowhere"), backend)
    assert all(isinstance(report, StepReport) for report in reports)


def test_nothing_is_allocated_in_a_step(options_with, backend):
    """tracemalloc counts the allocations of Python and NumPy; numba has its own counters."""
    from numba.core.runtime import _nrt_python, rtsys

    _nrt_python.memsys_enable_stats()
    options = options_with(out=None, val_every=0, seq_len=32, batch=15, total_batch=960)
    trainer = new_trainer(options, backend)
    reports = trainer.run()
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
    # numbers, views and reports remain: together less than the smallest array with one row per token
    assert peak - base < trainer.model.acts["encoded"].nbytes
    assert end - base < 4096
    assert after.alloc - before.alloc == after.free - before.free


def test_model_learns_to_copy(tmp_path, backend, options_with):
    """The second half of each sequence repeats the random first half; without attention the loss is ln 64 = 4.16."""
    half = 16
    generator = np.random.default_rng(0)

    def sequences(count):
        first = generator.integers(0, 64, (count, half))
        return np.concatenate([np.full((count, 1), 64), first, first], axis=1)[:, : 2 * half]

    # samples start at multiples of B·T, so that sequences of exactly T tokens are not split
    write_shard(tmp_path / "copy_train.bin", np.append(sequences(40_000).reshape(-1), 64))
    options = options_with(
        out=None, data=str(tmp_path / "copy_train.bin"), val_every=0, batch=32, seq_len=2 * half, total_batch=-1,
        steps=-1, lr=3e-3, warmup=50, weight_decay=0.0, skip_loss_z=0, skip_grad_z=0, clip=1.0,
        model=str(tmp_path / "copy.json"),
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "copy.json").write_text(json.dumps({**config, "n_embd": 64, "n_head": 4}))
    trainer = new_trainer(options, backend)
    for _ in trainer.run():
        pass
    fresh = sequences(32).astype(np.int32)
    targets = np.roll(fresh, -1, axis=1).astype(np.int32)
    targets[:, :half] = -1  # the first half is unpredictable
    targets[:, -1] = -1
    trainer.model.forward(fresh)
    losses = trainer.model.compute_losses(targets)
    assert float(losses.sum()) / (targets >= 0).sum() < 0.1
