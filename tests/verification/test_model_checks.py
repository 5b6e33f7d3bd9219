"""Checks of a model against a debug state: the golden state passes, and each planted error is detected."""

import math

import numpy as np
import pytest
from support.faulty_checks import STATE_OFFSETS, Float32Kernels, damaged_state, faulty_kernels
from support.paths import TINY_GPT2

from llmc_cli.errors import DataError
from llmc_cli.formats.debug_state import read_debug_state, write_debug_state
from llmc_cli.formats.errors import RangeError, SizeError
from llmc_cli.formats.header import HEADER_BYTES
from llmc_cli.formats.weights import TENSORS, read_header
from llmc_cli.kernels import spec
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.files import load_model, save_model
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.verification import model_checks
from llmc_cli.verification.model_checks import check_state, parse_losses, state_check_count


def failed_checks(kernels, state, steps=0, losses=None, model=TINY_GPT2 / "model.bin"):
    checks = list(check_state(model, state, kernels, steps, losses))
    assert len(checks) == state_check_count(steps)
    return {check.name for check in checks if not check.ok}


def golden_losses():
    return parse_losses((TINY_GPT2 / "losses.txt").read_text(), "losses.txt", 10)


def test_golden_state_of_pytorch_passes(backend):
    assert failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", 10, golden_losses()) == set()


def test_losses_default_to_those_of_the_reference(backend):
    assert failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", 10) == set()


@pytest.mark.parametrize(("name", "at"), STATE_OFFSETS)
def test_flipped_bit_is_reported_for_its_tensor(backend, tmp_path, name, at):
    assert failed_checks(backend.kernels, damaged_state(tmp_path, at)) == {name}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "at"), [place for place in STATE_OFFSETS if place.id.endswith("largest")])
def test_nan_and_infinity_are_reported_for_their_tensor(backend, tmp_path, name, at, bad):
    assert failed_checks(backend.kernels, damaged_state(tmp_path, at, bad)) == {name}


def test_changed_input_is_detected(backend, tmp_path):
    with pytest.raises(RangeError, match="token id"):
        list(check_state(TINY_GPT2 / "model.bin", damaged_state(tmp_path, HEADER_BYTES), backend.kernels, 0, None))
    ids = read_debug_state(TINY_GPT2 / "debug_state.bin", read_header(TINY_GPT2 / "model.bin")).x
    other = np.array([(ids[0, 0] + 1) % 97], np.int32).view(np.float32)[0]
    assert {"logits", "loss"} <= failed_checks(backend.kernels, damaged_state(tmp_path, HEADER_BYTES, other))


def test_gradient_of_the_padding_must_be_zero(tmp_path):
    at = next(place.values[1] for place in STATE_OFFSETS if place.id == "wte-last")
    checks = list(check_state(TINY_GPT2 / "model.bin", damaged_state(tmp_path, at, 1e-30), Float32Kernels(), 0, None))
    assert [check.what for check in checks if not check.ok] == ["padding"]
    kernels = faulty_kernels("embedding_backward", "dwte", lambda dwte: dwte.__setitem__((-1, 0), 1e-30))
    checks = list(check_state(TINY_GPT2 / "model.bin", TINY_GPT2 / "debug_state.bin", kernels, 0, None))
    assert [check.what for check in checks if not check.ok] == ["padding"]


@pytest.mark.parametrize(("name", "factor"), [("lr", 1.1), ("beta1", 0.9), ("beta2", 0.9), ("decay", 1e4)])
def test_other_adamw_settings_are_detected(backend, monkeypatch, name, factor):
    """The losses depend on each AdamW setting; on weight decay only weakly, as it changes a weight by 1e-6 per step."""

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
def test_wrong_loss_is_reported_for_its_step(backend, wrong):
    losses = golden_losses()
    losses[3] = wrong
    assert failed_checks(backend.kernels, TINY_GPT2 / "debug_state.bin", 10, losses) == {"loss 4"}


def test_bfloat16_model_matches_a_state_of_its_own_weights(backend, tmp_path):
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


def test_version_1_without_padding_passes(backend, tmp_path):
    """In version 1 the wte of model and state has V rows."""
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


def test_state_of_another_shape_is_an_error(backend, tmp_path):
    content = (TINY_GPT2 / "debug_state.bin").read_bytes()
    (tmp_path / "state.bin").write_bytes(content[:-4])
    with pytest.raises(SizeError):  # at the call, before the command prints anything
        check_state(TINY_GPT2 / "model.bin", tmp_path / "state.bin", backend.kernels, 0, None)


@pytest.mark.parametrize("line", ["", "four", "nan", "inf", "4.8 4.9", "0x10"])
def test_parse_losses_names_the_bad_line(line):
    with pytest.raises(DataError, match=r"losses\.txt, line 2"):
        parse_losses(f"4.8\n{line}\n4.7\n", "losses.txt", 3)


def test_parse_losses_requires_enough_losses():
    assert parse_losses("4.8\n4.7\n4.6\n", "losses.txt", 2) == [4.8, 4.7]
    with pytest.raises(DataError, match="found 3 losses, expected 4"):
        parse_losses("4.8\n4.7\n4.6", "losses.txt", 4)


@pytest.mark.witness
@pytest.mark.parametrize("seed", range(3))
def test_random_models_match_live_pytorch(backend, tmp_path, seed):
    """Logits, loss, gradients and ten AdamW steps of a random GPT-2 in transformers."""
    import torch
    from torch.nn import functional
    from transformers import GPT2Config, GPT2LMHeadModel

    rng = np.random.default_rng(seed)
    NH, L, V, T = (int(rng.integers(low, high)) for low, high in ((1, 5), (1, 4), (20, 400), (2, 40)))
    C, B = NH * int(rng.integers(2, 20)), int(rng.integers(1, 4))
    torch.manual_seed(seed)
    torch_model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_positions=T + 3, n_embd=C, n_layer=L, n_head=NH, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in torch_model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def converted(get):
        """Return the sixteen tensors, wte padded; ``get`` returns the values of a parameter."""
        t = torch_model.transformer
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
    for name, values in converted(lambda parameter: parameter.detach().numpy()).items():
        model.params[name][...] = values
    save_model(tmp_path / "model.bin", model)
    x, y = (rng.integers(0, V, (B, T), np.int32) for _ in range(2))
    optimizer = torch.optim.AdamW(torch_model.parameters(), lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        logits = torch_model(torch.from_numpy(x).long()).logits
        loss = functional.cross_entropy(logits.view(-1, V), torch.from_numpy(y).long().view(-1))
        loss.backward()
        if step == 0:
            grads = converted(lambda parameter: parameter.grad.numpy())
            write_debug_state(tmp_path / "state.bin", x, y, logits.detach().numpy(), loss.item(), grads)
        optimizer.step()
        losses.append(loss.item())
    failed = failed_checks(backend.kernels, tmp_path / "state.bin", 10, losses, tmp_path / "model.bin")
    assert failed == set()
