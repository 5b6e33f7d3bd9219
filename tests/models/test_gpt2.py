import math

import numpy as np
import pytest

from llmc_cli.errors import DataError, UsageError
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models import huggingface_config
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2, initialize
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.models.layout import flops_per_token, parameter_count
from llmc_cli.models.presets import PRESETS, preset
from llmc_cli.rng import MersenneTwister

CONFIG = ModelConfig(max_seq_len=12, vocab_size=37, num_layers=2, num_heads=2, channels=8)
B, T = 2, 9


@pytest.fixture
def model():
    """A model whose every parameter is random, norms and biases too; the padding of wte is 0."""
    model = GPT2(CONFIG, ReferenceKernels())
    generator = np.random.default_rng(0)
    model.params.flat[:] = generator.normal(0, 0.3, model.params.flat.shape)
    model.params["wte"][CONFIG.vocab_size :] = 0
    model.prepare(B, T)
    return model


@pytest.fixture
def batch():
    generator = np.random.default_rng(1)
    return generator.integers(0, 37, (2, B, T)).astype(np.int32)


def total_loss(model, batch, dloss):
    model.forward(batch[0])
    return dloss * float(model.compute_losses(batch[1]).sum())


def test_gradients_are_the_slopes_of_the_loss(model, batch):
    dloss = 1 / (B * T)
    model.forward(batch[0])
    model.backward(batch[1], dloss, acc=False)
    generator = np.random.default_rng(2)
    for name, view in model.params.items():
        flat, grad = view.reshape(-1), model.grads[name].reshape(-1).copy()
        # among others the element with the largest gradient, so that not all of the chosen ones are 0
        for index in {int(np.abs(grad).argmax()), *generator.integers(0, flat.size, 4).tolist()}:
            if name == "wte" and index >= CONFIG.vocab_size * CONFIG.channels:
                continue
            kept, step = flat[index], 1e-5
            flat[index] = kept + step
            above = total_loss(model, batch, dloss)
            flat[index] = kept - step
            below = total_loss(model, batch, dloss)
            flat[index] = kept
            assert grad[index] == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9), (name, index)


def test_gradients_add_up(model, batch):
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=False)
    once = model.grads.flat.copy()
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=True)
    np.testing.assert_allclose(model.grads.flat, 2 * once, rtol=1e-12, atol=1e-14)


def test_prefetched_batch_is_not_uploaded_again(model, batch):
    """The same results, and nothing is uploaded again; but where other ids came in between."""
    (ids, targets), other = batch, np.roll(batch, 1, axis=0)
    model.forward(ids)
    model.backward(targets, 0.5, acc=False)
    expected = model.losses().copy()
    uploads, upload = [], model.kernels.upload
    model.kernels.upload = lambda array, values: (uploads.append(1), upload(array, values))
    for between in (False, True):
        model.forward(other[0])
        model.backward(other[1], 0.5, acc=False)
        model.prefetch(ids, targets)
        model.losses()
        if between:
            model.forward(other[0])
            model.compute_losses(other[1])
        del uploads[:]
        model.forward(ids)
        model.backward(targets, 0.5, acc=False)
        np.testing.assert_array_equal(model.losses(), expected)
        assert len(uploads) == (2 if between else 0)


def test_what_was_in_the_gradients_is_overwritten(model, batch):
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=False)
    once = model.grads.flat.copy()
    model.grads.flat[:] = np.nan
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=False)
    np.testing.assert_array_equal(model.grads.flat, once)


def test_padding_gets_no_gradient(model, batch):
    model.forward(batch[0])
    model.backward(batch[1], 1.0, acc=False)
    assert not model.grads["wte"][CONFIG.vocab_size :].any()


def test_loss_and_backward_agree(model, batch):
    model.forward(batch[0])
    losses = model.compute_losses(batch[1]).copy()
    model.backward(batch[1], 1.0, acc=False)
    np.testing.assert_allclose(model.losses(), losses, rtol=1e-12)


def test_logits_give_the_loss(model, batch):
    model.forward(batch[0])
    logits = model.logits(slice(None))
    assert logits.shape == (B * T, CONFIG.vocab_size)
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(B * T), batch[1].reshape(-1)]
    np.testing.assert_allclose(model.compute_losses(batch[1]), expected, rtol=1e-10)


@pytest.mark.parametrize("cuts", [[9], [1] * 9, [4, 1, 3, 1]])
def test_cache_gives_the_same_hidden_states(model, batch, cuts):
    model.forward(batch[0])
    expected = model.acts["lnf"].reshape(B, T, -1)
    cache = KVCache(CONFIG, model.kernels, B, T, B * max(cuts))
    start = 0
    for length in cuts:
        hidden = model.extend(cache, np.ascontiguousarray(batch[0][:, start : start + length]))
        np.testing.assert_allclose(hidden, expected[:, start : start + length], rtol=1e-10, atol=1e-12)
        start += length
    assert cache.lengths.tolist() == [T, T]


def test_the_future_does_not_reach_the_past(model, batch):
    model.forward(batch[0])
    before = model.acts["lnf"].reshape(B, T, -1)[:, :5].copy()
    changed = batch[0].copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 37
    model.forward(changed)
    np.testing.assert_array_equal(model.acts["lnf"].reshape(B, T, -1)[:, :5], before)


def test_fresh_weights_follow_the_recipe():
    model = GPT2(CONFIG, ReferenceKernels())
    model.params.flat[:] = np.nan
    initialize(model, 42)
    p, generator = model.params, MersenneTwister(42)

    def normals(shape, std):
        out = np.empty(math.prod(shape))
        generator.fill_normal(out, std)
        return out.reshape(shape)

    np.testing.assert_array_equal(p["wte"][:37], normals((37, 8), 0.02))
    np.testing.assert_array_equal(p["wpe"], normals((12, 8), 0.02))
    for layer in range(2):
        np.testing.assert_array_equal(p["qkvw"][layer], normals((24, 8), 0.02))
        np.testing.assert_allclose(p["attprojw"][layer], normals((8, 8), 0.01), rtol=1e-6)
        np.testing.assert_array_equal(p["fcw"][layer], normals((32, 8), 0.02))
        np.testing.assert_allclose(p["fcprojw"][layer], normals((8, 32), 0.01), rtol=1e-6)
    assert not p["wte"][37:].any()
    for name in ("ln1w", "ln2w", "lnfw"):
        assert (p[name] == 1).all()
    for name in ("ln1b", "ln2b", "lnfb", "qkvb", "attprojb", "fcb", "fcprojb"):
        assert not p[name].any()


def test_what_is_overwritten_is_not_brought_to_the_host(monkeypatch):
    monkeypatch.delattr(ReferenceKernels, "download")
    model = GPT2(CONFIG, ReferenceKernels())
    initialize(model, 42)
    assert model.params["wte"][: CONFIG.vocab_size].all()


def test_sizes_of_the_124m_model():
    config = preset("d12")
    assert config.padded_vocab_size == 50304
    assert parameter_count(config) == 124_475_904
    assert flops_per_token(config, 64) == 6 * 124_475_904 + 6 * 12 * 768 * 64


def test_every_preset_divides_into_heads():
    assert all(config.channels % config.num_heads == 0 for config in PRESETS.values())
    assert preset("gpt2:d48") == preset("d48")
    assert preset("gpt3:c2560").head_size == 80


def test_unknown_preset():
    with pytest.raises(UsageError, match="d84"):
        preset("d13")


def test_config_file_round_trip(tmp_path):
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps(huggingface_config.config_values(CONFIG)))
    assert huggingface_config.read_config(path) == CONFIG


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"model_type": "gptj"}, "model_type"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"n_inner": 7}, "n_inner"),
        ({"n_head": 3}, "8 channels in 3 heads"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_layer": "two"}, "not the JSON"),
        ({"n_layer": 0}, "0 layers"),
    ],
)
def test_config_file_of_another_model(tmp_path, change, text):
    import json

    path = tmp_path / "config.json"
    path.write_text(json.dumps({**huggingface_config.config_values(CONFIG), **change}))
    with pytest.raises(DataError, match=text):
        huggingface_config.read_config(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "gpt2"}', '{"n_positions": 1e999}'])
def test_config_file_that_is_none(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"config\.json"):
        huggingface_config.read_config(path)


@pytest.mark.parametrize("recompute", [1, 2])
def test_what_is_computed_again_has_the_same_bits(backend, batch, recompute):
    def gradients(level):
        model = GPT2(CONFIG, backend.kernels)
        initialize(model, 1)
        model.prepare(B, T, recompute=level)
        model.forward(batch[0])
        model.backward(batch[1], 0.5, acc=False)
        return model

    kept, again = gradients(0), gradients(recompute)
    np.testing.assert_array_equal(again.grads.flat, kept.grads.flat)
    assert again.acts.flat.nbytes < kept.acts.flat.nbytes
