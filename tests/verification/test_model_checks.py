"""The checks must pass on right kernels, and each must fail on a planted fault."""

import inspect
import math

import numpy as np
import pytest
from support.faulty_checks import STATE_OFFSETS, Float32Kernels, damaged_state, faulty_kernels, perturb_last
from support.paths import TINY_GPT2

from llmc_cli.errors import DataError
from llmc_cli.formats.debug_state import read_debug_state, write_debug_state
from llmc_cli.formats.errors import RangeError, SizeError
from llmc_cli.formats.header import HEADER_BYTES
from llmc_cli.formats.weights import TENSORS, read_header
from llmc_cli.kernels import spec
from llmc_cli.kernels.backend import open_kernels
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.files import load_model, save_model
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.verification import model_checks
from llmc_cli.verification.kernel_checks import check_kernels, check_operation, check_training, kernel_check_count
from llmc_cli.verification.model_checks import check_state, parse_losses, state_check_count

OUTPUTS = [(name, output) for name, operation in OPERATIONS.items() for output in operation.bounds]


def test_right_kernels_pass():
    checks = list(check_kernels(Float32Kernels()))
    assert len(checks) == kernel_check_count()
    assert all(check.ok for check in checks)
    assert {check.name for check in checks} == {*OPERATIONS, "tiny model"}


def test_the_kernels_of_this_machine_pass(backend):
    assert [check for check in check_kernels(backend.kernels) if not check.ok] == []


@pytest.mark.parametrize(("operation", "output"), OUTPUTS)
def test_a_fault_in_any_output_is_named(operation, output):
    checks = list(check_operation(faulty_kernels(operation, output, perturb_last), operation))
    failed = [check.what.partition(":")[0] for check in checks if not check.ok]
    assert failed == [output]


@pytest.mark.parametrize(("operation", "output"), OUTPUTS)
def test_a_nan_in_any_output_is_named(operation, output):
    def spoil(values):
        values.reshape(-1)[0] = np.nan

    checks = list(check_operation(faulty_kernels(operation, output, spoil), operation))
    assert [check.what.partition(":")[0] for check in checks if not check.ok] == [output]


@pytest.mark.parametrize(
    ("operation", "output"), [("embedding_backward", "dwpe")] + [each for each in OUTPUTS if each[1] in ("dw", "db")]
)
@pytest.mark.parametrize("adds", [True, False])
def test_acc_that_is_ignored_is_found(operation, output, adds):
    """An operation that always adds, or never does."""
    kernels = Float32Kernels()
    right = getattr(kernels, operation)

    def wrong(*args):
        kept = np.nan_to_num(args[list(inspect.signature(right).parameters).index(output)].copy(), nan=1.0)
        right(*args[:-1], False)
        if adds:
            args[list(inspect.signature(right).parameters).index(output)][...] += kept

    def patched(*args):
        if args[list(inspect.signature(right).parameters).index(output)] is None:
            right(*args)
        else:
            wrong(*args)

    setattr(kernels, operation, patched)
    assert output in [check.what.partition(":")[0] for check in check_operation(kernels, operation) if not check.ok]


# training neither samples nor shows logits, and AdamW does not feel the scale of all gradients
@pytest.mark.parametrize("operation", sorted(set(OPERATIONS) - {"attention_cached", "head_logits", "sum_squares"}))
def test_a_fault_shows_in_the_tiny_training_too(operation):
    output = next(iter(OPERATIONS[operation].bounds))

    def tenth_more(values):
        values *= 1.1

    assert any(not check.ok for check in check_training(faulty_kernels(operation, output, tenth_more)))


def failed_checks(kernels, state, steps=0, losses=None, model=TINY_GPT2 / "model.bin"):
    checks = list(check_state(model, state, kernels, steps, losses))
    assert len(checks) == state_check_count(steps)
    return {check.name for check in checks if not check.ok}


def golden_losses():
    return parse_losses((TINY_GPT2 / "losses.txt").read_text(), "losses.txt", 10)


def test_the_golden_state_of_pytorch(backend):
    assert failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", 10, golden_losses()) == set()


def test_without_losses_the_reference_computes_them(backend):
    assert failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", 10) == set()


@pytest.mark.parametrize(("name", "at"), STATE_OFFSETS)
def test_a_flipped_bit_is_named(backend, tmp_path, name, at):
    assert failed_checks(backend.kernels, damaged_state(tmp_path, at)) == {name}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "at"), [place for place in STATE_OFFSETS if place.id.endswith("largest")])
def test_what_is_not_finite_is_named(backend, tmp_path, name, at, bad):
    assert failed_checks(backend.kernels, damaged_state(tmp_path, at, bad)) == {name}


def test_a_changed_input_is_seen(backend, tmp_path):
    with pytest.raises(RangeError, match="token id"):
        list(check_state(TINY_GPT2 / "model.bin", damaged_state(tmp_path, HEADER_BYTES), backend.kernels, 0, None))
    ids = read_debug_state(TINY_GPT2 / "debug_state.bin", read_header(TINY_GPT2 / "model.bin")).x
    other = np.array([(ids[0, 0] + 1) % 97], np.int32).view(np.float32)[0]
    assert {"logits", "loss"} <= failed_checks(backend.kernels, damaged_state(tmp_path, HEADER_BYTES, other))


def test_the_gradient_of_the_padding_must_be_zero(tmp_path):
    at = next(place.values[1] for place in STATE_OFFSETS if place.id == "wte-last")
    checks = list(check_state(TINY_GPT2 / "model.bin", damaged_state(tmp_path, at, 1e-30), Float32Kernels(), 0, None))
    assert [check.what for check in checks if not check.ok] == ["padding"]
    kernels = faulty_kernels("embedding_backward", "dwte", lambda dwte: dwte.__setitem__((-1, 0), 1e-30))
    checks = list(check_state(TINY_GPT2 / "model.bin", TINY_GPT2 / "debug_state.bin", kernels, 0, None))
    assert [check.what for check in checks if not check.ok] == ["padding"]


@pytest.mark.parametrize(("name", "factor"), [("lr", 1.1), ("beta1", 0.9), ("beta2", 0.9), ("decay", 1e4)])
def test_other_steps_are_seen(backend, monkeypatch, name, factor):
    """The losses tell AdamW with other settings from the right one; with decay only if it is much (it moves a weight by
    a millionth a step)."""

    class Other(model_checks.AdamW):
        def step(self, lr, t):
            super().step(lr * factor if name == "lr" else lr, t)

        def __init__(self, model, **settings):
            super().__init__(model, **settings)
            if name != "lr":
                self.settings[spec.HYPER.index(name)] *= factor

    monkeypatch.setattr(model_checks, "AdamW", Other)
    failed = failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", 10, golden_losses())
    assert failed
    assert all(each.startswith("loss ") for each in failed)


@pytest.mark.parametrize("wrong", [math.nan, 4.85])
def test_a_wrong_loss_is_named(backend, wrong):
    losses = golden_losses()
    losses[3] = wrong
    assert failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", 10, losses) == {"loss 4"}


def test_a_model_in_bfloat16_against_a_state_of_its_own_weights(backend, tmp_path):
    path = TINY_GPT2 / "model_bf16.bin"
    golden = read_debug_state(TINY_GPT2 / "debug_state.bin", read_header(path))
    model = load_model(path, ReferenceKernels())
    model.prepare(*golden.x.shape)
    model.forward(golden.x)
    logits = model.logits(slice(None)).astype(np.float32).reshape(golden.logits.shape)
    model.backward(golden.y, 1.0 / golden.x.size, acc=False)
    loss = model.losses().mean()
    grads = {name: grad.astype(np.float32) for name, grad in model.grads.items()}
    write_debug_state(tmp_path / "state.bin", golden.x, golden.y, logits, float(loss), grads)
    assert failed_checks(backend.kernels, tmp_path / "state.bin", 2, model=path) == set()
    assert "logits" in failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", model=path)


def test_version_1_has_no_padding(backend, tmp_path):
    """A model and a state whose wte has V rows."""
    model = load_model(TINY_GPT2 / "model.bin", backend.kernels)
    save_model(tmp_path / "model.bin", model, version=1)
    state = read_debug_state(TINY_GPT2 / "debug_state.bin", read_header(TINY_GPT2 / "model.bin"))
    V, C = model.config.vocab_size, model.config.channels
    content = bytearray((TINY_GPT2 / "debug_state.bin").read_bytes())
    content[4:8] = (1).to_bytes(4, "little")
    padding = HEADER_BYTES + 8 * state.x.size + 4 * (state.logits.size + 1 + V * C)
    del content[padding : padding + 4 * (state.grads["wte"].size - V * C)]
    (tmp_path / "state.bin").write_bytes(content)
    failed = failed_checks(backend.kernels, tmp_path / "state.bin", 2, golden_losses(), tmp_path / "model.bin")
    assert failed == set()


def test_a_state_of_another_shape_is_refused(backend, tmp_path):
    content = (TINY_GPT2 / "debug_state.bin").read_bytes()
    (tmp_path / "state.bin").write_bytes(content[:-4])
    with pytest.raises(SizeError):
        next(check_state(TINY_GPT2 / "model.bin", tmp_path / "state.bin", backend.kernels, 0, None))


@pytest.mark.parametrize("line", ["", "four", "nan", "inf", "4.8 4.9", "0x10"])
def test_bad_lines_of_losses(line):
    with pytest.raises(DataError, match=r"losses\.txt, line 2"):
        parse_losses(f"4.8\n{line}\n4.7\n", "losses.txt", 3)


def test_losses_must_be_enough():
    assert parse_losses("4.8\n4.7\n4.6\n", "losses.txt", 2) == [4.8, 4.7]
    with pytest.raises(DataError, match="found 3 losses, expected 4"):
        parse_losses("4.8\n4.7\n4.6", "losses.txt", 4)


@pytest.mark.witness
@pytest.mark.parametrize("seed", range(3))
def test_against_live_pytorch(backend, tmp_path, seed):
    """A random GPT-2 of transformers: its logits, loss, gradients and ten steps of torch's AdamW."""
    import torch
    from torch.nn import functional
    from transformers import GPT2Config, GPT2LMHeadModel

    rng = np.random.default_rng(seed)
    NH, L, V, T = (int(rng.integers(low, high)) for low, high in ((1, 5), (1, 4), (20, 400), (2, 40)))
    C, B = NH * int(rng.integers(2, 20)), int(rng.integers(1, 4))
    torch.manual_seed(seed)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_positions=T + 3, n_embd=C, n_layer=L, n_head=NH, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def ours(get):
        """The sixteen tensors, wte padded, from what ``get`` makes of a parameter."""
        t = theirs.transformer
        by_layer = {
            "ln1w": "ln_1.weight", "ln1b": "ln_1.bias", "qkvw": "attn.c_attn.weight", "qkvb": "attn.c_attn.bias",
            "attprojw": "attn.c_proj.weight", "attprojb": "attn.c_proj.bias", "ln2w": "ln_2.weight",
            "ln2b": "ln_2.bias", "fcw": "mlp.c_fc.weight", "fcb": "mlp.c_fc.bias", "fcprojw": "mlp.c_proj.weight",
            "fcprojb": "mlp.c_proj.bias",
        }  # fmt: skip
        tensors = {
            name: np.stack([get(layer.get_parameter(source)).T for layer in t.h]) for name, source in by_layer.items()
        }
        padding = np.zeros((-V % 128, C), np.float32)
        tensors |= {"wte": np.concatenate([get(t.wte.weight), padding]), "wpe": get(t.wpe.weight)}
        tensors |= {"lnfw": get(t.ln_f.weight), "lnfb": get(t.ln_f.bias)}
        return {name: np.ascontiguousarray(tensors[name], np.float32) for name in TENSORS}

    model = GPT2(ModelConfig(T + 3, V, L, NH, C), backend.kernels)
    for name, values in ours(lambda parameter: parameter.detach().numpy()).items():
        model.params[name][...] = values
    save_model(tmp_path / "model.bin", model)
    x, y = (rng.integers(0, V, (B, T), np.int32) for _ in range(2))
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        logits = theirs(torch.from_numpy(x).long()).logits
        loss = functional.cross_entropy(logits.view(-1, V), torch.from_numpy(y).long().view(-1))
        loss.backward()
        if step == 0:
            grads = ours(lambda parameter: parameter.grad.numpy())
            write_debug_state(tmp_path / "state.bin", x, y, logits.detach().numpy(), loss.item(), grads)
        optimizer.step()
        losses.append(loss.item())
    failed = failed_checks(backend.kernels, tmp_path / "state.bin", 10, losses, tmp_path / "model.bin")
    assert failed == set()


def test_bf16_is_held_to_bounds_of_its_own():
    kernels = open_kernels("cpu", "bf16", 1).kernels
    assert all(check.ok for check in check_kernels(kernels, "bf16"))
    failed = {check.name for check in check_kernels(kernels, "fp32") if not check.ok}
    assert {"linear_forward", "head_loss", "tiny model"} <= failed
