import numpy as np
import pytest

from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.initialization import initialize
from llmc_cli.models.kv_cache import KVCache

CONFIG = ModelConfig(max_seq_len=12, vocab_size=37, num_layers=2, num_heads=2, channels=8)
B, T = 2, 9


@pytest.fixture
def model():
    """A model with random parameters, including norms and biases; the padding of wte is 0."""
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


def test_gradients_equal_finite_differences(model, batch):
    dloss = 1 / (B * T)
    model.forward(batch[0])
    model.backward(batch[1], dloss, acc=False)
    generator = np.random.default_rng(2)
    for name, view in model.params.items():
        flat, grad = view.reshape(-1), model.grads[name].reshape(-1).copy()
        # Include the largest gradient, because most sampled ones may be 0.
        for index in {int(np.abs(grad).argmax()), *generator.integers(0, flat.size, 4).tolist()}:
            if name == "wte" and index >= CONFIG.vocab_size * CONFIG.channels:
                continue
            value, step = flat[index], 1e-5
            flat[index] = value + step
            above = total_loss(model, batch, dloss)
            flat[index] = value - step
            below = total_loss(model, batch, dloss)
            flat[index] = value
            assert grad[index] == pytest.approx((above - below) / (2 * step), rel=1e-6, abs=1e-9), (name, index)


def test_gradients_accumulate(model, batch):
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=False)
    once = model.grads.flat.copy()
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=True)
    np.testing.assert_allclose(model.grads.flat, 2 * once, rtol=1e-12, atol=1e-14)


def test_gradients_are_overwritten_without_accumulation(model, batch):
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=False)
    once = model.grads.flat.copy()
    model.grads.flat[:] = np.nan
    model.forward(batch[0])
    model.backward(batch[1], 0.5, acc=False)
    np.testing.assert_array_equal(model.grads.flat, once)


@pytest.mark.parametrize("recompute", [1, 2])
def test_recomputation_gives_the_same_bits(backend, batch, recompute):
    def train_step(level):
        model = GPT2(CONFIG, backend.kernels)
        initialize(model, 1)
        model.prepare(B, T, recompute=level)
        model.forward(batch[0])
        model.backward(batch[1], 0.5, acc=False)
        return model

    stored, recomputed = train_step(0), train_step(recompute)
    np.testing.assert_array_equal(recomputed.grads.flat, stored.grads.flat)
    assert recomputed.acts.flat.nbytes < stored.acts.flat.nbytes


def test_prefetched_batch_is_not_uploaded_again(model, batch):
    """After another batch in between, the prefetch is discarded and the batch is uploaded."""
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


def test_padded_vocabulary_has_zero_gradients(model, batch):
    model.forward(batch[0])
    model.backward(batch[1], 1.0, acc=False)
    assert not model.grads["wte"][CONFIG.vocab_size :].any()


def test_compute_losses_equals_losses_of_backward(model, batch):
    model.forward(batch[0])
    losses = model.compute_losses(batch[1]).copy()
    model.backward(batch[1], 1.0, acc=False)
    np.testing.assert_allclose(model.losses(), losses, rtol=1e-12)


def test_losses_are_cross_entropy_of_the_logits(model, batch):
    model.forward(batch[0])
    logits = model.logits(slice(None))
    assert logits.shape == (B * T, CONFIG.vocab_size)
    shifted = logits - logits.max(axis=1, keepdims=True)
    expected = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(B * T), batch[1].reshape(-1)]
    np.testing.assert_allclose(model.compute_losses(batch[1]), expected, rtol=1e-10)


@pytest.mark.parametrize("chunks", [[9], [1] * 9, [4, 1, 3, 1]])
def test_cached_hidden_states_equal_uncached(model, batch, chunks):
    model.forward(batch[0])
    expected = model.acts["lnf"].reshape(B, T, -1)
    cache = KVCache(CONFIG, model.kernels, B, T, B * max(chunks))
    start = 0
    for length in chunks:
        hidden = model.extend(cache, np.ascontiguousarray(batch[0][:, start : start + length]))
        np.testing.assert_allclose(hidden, expected[:, start : start + length], rtol=1e-10, atol=1e-12)
        start += length
    assert cache.lengths.tolist() == [T, T]


def test_attention_is_causal(model, batch):
    model.forward(batch[0])
    before = model.acts["lnf"].reshape(B, T, -1)[:, :5].copy()
    changed = batch[0].copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 37
    model.forward(changed)
    np.testing.assert_array_equal(model.acts["lnf"].reshape(B, T, -1)[:, :5], before)
