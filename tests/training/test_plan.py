import pytest
from support.training_runs import new_trainer, run

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.training.plan import make_plan


def test_fresh_run_into_a_finished_one_is_refused(tiny_options, backend):
    run(tiny_options, backend)
    with pytest.raises(UsageError, match=r"holds a complete checkpoint \(step 20\)"):
        make_plan(tiny_options, backend)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 1e-3}, "--lr was 0.01, is 0.001"),
        ({"steps": 30}, "--steps was 20, is 30"),
        ({"seed": 1}, "--seed"),
        ({"batch": 1}, "--batch was 2, is 1"),
        ({"schedule": "linear"}, "--schedule"),
        ({"data": "val"}, "the training data are different"),
    ],
)
def test_resume_with_changed_options_is_refused(options_with, backend, tiny_data, change, text):
    run(options_with(), backend, stop_after=3)
    if change.get("data"):
        change = {"data": str(tiny_data / "tiny_train_0.bin")}
    with pytest.raises(UsageError, match=text):
        make_plan(options_with(resume=True, **change), backend)


def test_default_length_is_one_epoch(options_with, backend):
    assert make_plan(options_with(steps=-1), backend).steps == 1200 // 64


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"total_batch": 50}, r"expected a multiple of --batch x --seq-len = \d+ x \d+ = 32"),
        ({"total_batch": 0}, r"expected a multiple of --batch x --seq-len = \d+ x \d+ = 32"),
        ({"seq_len": 33}, "has a context of 32 tokens"),
        ({"model": "d7"}, "unknown model 'd7'"),
        ({"schedule": "cos"}, "--schedule cos: expected one of cosine, linear"),
        ({"out": None, "resume": True}, "--resume needs --out"),
        ({"steps": 0}, "--steps 0: expected at least 1"),
        ({"val_steps": 0}, "--val-steps 0"),
        ({"steps": -1, "total_batch": 3200}, "fewer than one step needs"),
    ],
)
def test_contradictory_options_are_refused(options_with, backend, change, text):
    with pytest.raises(UsageError, match=text):
        make_plan(options_with(**change), backend)


def test_model_larger_than_memory_is_refused(options_with, backend):
    with pytest.raises(MissingError, match=r"needs .* GB of memory; only this machine has"):
        make_plan(options_with(model="gpt3:c12288"), backend)


def test_planned_memory_equals_the_arenas(options_with, backend):
    trainer = new_trainer(options_with(out=None), backend)
    list(trainer.run())
    model, optimizer, plan = trainer.model, trainer.optimizer, trainer.plan
    assert plan.memory["parameters"] == model.params.flat.nbytes
    assert plan.memory["gradients"] == model.grads.flat.nbytes
    assert plan.memory["moments"] == optimizer.m.nbytes + optimizer.v.nbytes
    assert plan.memory["activations"] == model.acts.flat.nbytes + model.stats.flat.nbytes
    assert plan.memory["workspace"] >= model.scratch.flat.nbytes
