"""The reference kernels: forward against formulas in loops, backward against finite differences, both against PyTorch.

The PyTorch values are in ``fixtures/kernel_goldens.npz``, written by ``fixtures/make_kernel_goldens.py``.
"""

import math
import runpy

import numpy as np
import pytest
from support.paths import FIXTURES

from llmc_cli.kernels.reference.kernels import REFERENCE


def normal(seed, *shape):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def gradient(function, x, step=1e-6):
    """Return the central differences of ``function`` with respect to x, which is modified in place and restored."""
    result = np.empty_like(x)
    for index in np.ndindex(x.shape):
        value = x[index]
        x[index] = value + step
        above = function()
        x[index] = value - step
        below = function()
        x[index] = value
        result[index] = (above - below) / (2 * step)
    return result


def close(found, expected, bound=1e-8):
    np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)


def linear(x, w, b):
    return np.array([[sum(x[n] * w[o]) + b[o] for o in range(len(w))] for n in range(len(x))])


def gelu(x):
    return np.vectorize(lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))))(x)


def norm(x, w, b, eps):
    rows = []
    for row in x:
        mean = sum(row) / len(row)
        variance = sum((row - mean) ** 2) / len(row)
        rows.append((row - mean) / math.sqrt(variance + eps) * w + b)
    return np.array(rows)


def attention(qkv, num_heads):
    """Return out and lse, computed position by position."""
    B, T, C3 = qkv.shape
    C = C3 // 3
    HS = C // num_heads
    out, lse = np.zeros((B, T, C)), np.zeros((B, num_heads, T))
    for b, h, t in np.ndindex(B, num_heads, T):
        q = qkv[b, t, h * HS : (h + 1) * HS]
        keys = [qkv[b, s, C + h * HS : C + (h + 1) * HS] for s in range(t + 1)]
        values = [qkv[b, s, 2 * C + h * HS : 2 * C + (h + 1) * HS] for s in range(t + 1)]
        weights = [math.exp(sum(q * k) / math.sqrt(HS)) for k in keys]
        lse[b, h, t] = math.log(sum(weights))
        mixed = sum(p * v for p, v in zip(weights, values, strict=True)) / sum(weights)
        out[b, t, h * HS : (h + 1) * HS] = mixed
    return out, lse


def cross_entropy(x, w, targets):
    """Return the loss of each row."""
    losses = []
    for row, target in zip(x, targets, strict=True):
        logits = [sum(row * v) for v in w]
        total = sum(math.exp(value) for value in logits)
        losses.append(0.0 if target < 0 else math.log(total) - logits[target])
    return np.array(losses)


def test_embedding_matches_differences():
    V, T, N, C = 5, 4, 7, 3
    wte, wpe, seed = normal(1, V, C), normal(2, T, C), normal(3, N, C)
    ids, positions = np.array([0, 3, 3, 4, 0, 0, 2], np.int32), np.array([0, 1, 2, 0, 1, 2, 2], np.int32)
    x = np.empty((N, C))

    def total():
        return sum(sum((wte[i] + wpe[p]) * s) for i, p, s in zip(ids, positions, seed, strict=True))

    REFERENCE.embedding_forward(x, wte, wpe, ids, positions)
    close(x, [wte[i] + wpe[p] for i, p in zip(ids, positions, strict=True)])
    dwte, dwpe = np.ones((V, C)), np.full((T, C), np.nan)
    REFERENCE.embedding_backward(dwte, dwpe, seed, ids, positions, False)
    close(dwte - 1.0, gradient(total, wte))
    close(dwpe, gradient(total, wpe))
    REFERENCE.embedding_backward(dwte, dwpe, seed, ids, positions, True)
    close(dwte - 1.0, 2 * gradient(total, wte))
    close(dwpe, 2 * gradient(total, wpe))


@pytest.mark.parametrize(("first_norm", "biased"), [(False, True), (False, False), (True, False)])
def test_residual_norm_matches_differences(first_norm, biased):
    N, C, eps = 3, 5, 1e-3
    x, delta, seed, seed_res = (normal(i, N, C) for i in range(4))
    w, b, bias = (normal(i, C) if i else normal(i, C) * biased for i in (1, 2, 0))
    res, y, mean, rstd = np.empty((N, C)), np.empty((N, C)), np.empty(N), np.empty(N)

    def total():
        stream = x if first_norm else x + delta + bias
        return (norm(stream, w, b, eps) * seed).sum() + (stream * seed_res).sum()

    added = (None if first_norm else delta, bias if biased else None)
    REFERENCE.residual_norm_forward(res, y, mean, rstd, x, *added, w, b, eps)
    stream = x if first_norm else x + delta + bias
    close(y, norm(stream, w, b, eps))
    if not first_norm:
        close(res, stream)
    dx, dw, db = np.empty((N, C)), np.ones(C), np.ones(C)
    REFERENCE.residual_norm_backward(dx, dw, db, seed, stream, mean, rstd, w, seed_res, True)
    close(dx, gradient(total, x), 1e-7)
    if biased:
        close(dx.sum(axis=0), gradient(total, bias), 1e-7)
    close(dw - 1.0, gradient(total, w), 1e-7)
    close(db - 1.0, gradient(total, b), 1e-7)
    without = np.empty((N, C))
    REFERENCE.residual_norm_backward(without, dw, db, seed, stream, mean, rstd, w, None, False)
    close(without + seed_res, dx)
    close(db, seed.sum(axis=0))


def test_linear_matches_differences():
    N, C, F = 3, 4, 5
    x, w, b, seed = normal(1, N, C), normal(2, F, C), normal(3, F), normal(4, N, F)
    y = np.empty((N, F))

    def total():
        return (linear(x, w, b) * seed).sum()

    REFERENCE.linear_forward(y, x, w, b)
    close(y, linear(x, w, b))
    REFERENCE.linear_forward(y, x, w, None)
    close(y, linear(x, w, 0 * b))
    dx, dw, db = np.empty((N, C)), np.ones((F, C)), np.ones(F)
    REFERENCE.linear_backward(dx, dw, db, seed, x, w, True)
    close(dx, gradient(total, x))
    close(dw - 1.0, gradient(total, w))
    close(db - 1.0, gradient(total, b))


def test_gelu_between_two_linear_layers_matches_differences():
    N, C, F = 3, 4, 5
    x, w, b, w2, b2, seed = (normal(i, *s) for i, s in enumerate([(N, C), (F, C), (F,), (C, F), (C,), (N, C)]))
    act, pre = np.empty((N, F)), np.empty((N, F))

    def total():
        return (linear(gelu(linear(x, w, b)), w2, b2) * seed).sum()

    REFERENCE.linear_gelu_forward(act, pre, x, w, b)
    close(pre, linear(x, w, b))
    close(act, gelu(pre))
    dpre, dw2, db2 = np.empty((N, F)), np.empty((C, F)), np.empty(C)
    REFERENCE.gelu_linear_backward(dpre, dw2, db2, seed, act, pre, w2, False)
    close(dpre.sum(axis=0), gradient(total, b))
    close(dw2, gradient(total, w2))
    close(db2, gradient(total, b2))


def test_attention_matches_differences():
    B, T, NH, HS = 2, 5, 2, 3
    C = NH * HS
    qkv, seed = normal(1, B, T, 3 * C), normal(2, B, T, C)
    out, lse, dqkv = np.empty((B, T, C)), np.empty((B, NH, T)), np.empty((B, T, 3 * C))

    def total():
        return (attention(qkv, NH)[0] * seed).sum()

    REFERENCE.attention_forward(out, lse, qkv, NH)
    expected = attention(qkv, NH)
    close(out, expected[0])
    close(lse, expected[1])
    REFERENCE.attention_backward(dqkv, seed, out, lse, qkv, NH)
    close(dqkv, gradient(total, qkv))


def test_attention_cached_in_steps_equals_attention():
    B, T, NH, HS, prompt = 2, 7, 2, 3, 3
    C = NH * HS
    qkv = normal(1, B, T, 3 * C)
    expected = attention(qkv, NH)[0]
    keys, values = np.full((B, NH, T, HS), np.nan), np.full((B, NH, T, HS), np.nan)
    lengths, start = np.zeros(B, np.int32), 0
    for count in (prompt, 1, T - prompt - 1):
        out = np.empty((B, count, C))
        REFERENCE.attention_cached(out, keys, values, qkv[:, start : start + count].copy(), lengths, NH)
        close(out, expected[:, start : start + count])
        lengths += count
        start += count


def test_head_loss_matches_differences():
    N, C, V, Vp = 4, 3, 5, 8
    x, w = normal(1, N, C), normal(2, Vp, C)
    targets = np.array([2, -1, 4, 0], np.int32)
    losses, dx, dw = np.empty(N), np.empty((N, C)), np.full((Vp, C), np.nan)

    def total():
        return 0.5 * cross_entropy(x, w[:V], targets).sum()

    REFERENCE.head_loss(losses, dx, dw, x, w, targets, V, 0.5, False)
    close(losses, cross_entropy(x, w[:V], targets))
    close(dx, gradient(total, x))
    close(dw, gradient(total, w))
    logits = np.empty((N, V))
    REFERENCE.head_logits(logits, x, w)
    close(logits, linear(x, w[:V], np.zeros(V)))


def test_sum_squares_and_first_adamw_step():
    g = np.array([3.0, -4.0, 12.0])
    out = np.empty(1)
    REFERENCE.sum_squares(out, g)
    assert out[0] == 169.0
    p, m, v = np.array([1.0, 2.0, 3.0]), np.zeros(3), np.zeros(3)
    segments = np.array([[0, 1, 1], [1, 2, 0]], np.int64)
    # first step: m/correction1 = g and v/correction2 = g², so each element changes by lr against its gradient's sign
    hyper = np.array([0.1, 0.9, 0.99, 0.0, 0.5, 0.1, 0.01, 1.0])
    REFERENCE.adamw(p, m, v, g, segments, hyper, out)
    close(p, [1.0 - 0.1 * (1 + 0.5), 2.0 + 0.1, 3.0 - 0.1])
    close(m, 0.1 * g / 13.0)
    close(v, 0.01 * g**2 / 169.0)


def compare(values):
    """Compare the reference with PyTorch's ``values`` (see fixtures/make_kernel_goldens.py)."""
    g = values
    N, C = g["norm_x"].shape
    y, mean, rstd = np.empty((N, C)), np.empty(N), np.empty(N)
    REFERENCE.residual_norm_forward(g["norm_x"], y, mean, rstd, g["norm_x"], None, None, g["norm_w"], g["norm_b"], 1e-5)
    close(y, g["norm_y"], 1e-12)
    dx, dw, db = np.empty((N, C)), np.empty(C), np.empty(C)
    REFERENCE.residual_norm_backward(dx, dw, db, g["norm_dy"], g["norm_x"], mean, rstd, g["norm_w"], None, False)
    close(dx, g["norm_dx"], 1e-12)
    close(dw, g["norm_dw"], 1e-12)
    close(db, g["norm_db"], 1e-12)

    x, dy = g["gelu_x"], g["gelu_dy"]
    act, pre, identity = np.empty_like(x), np.empty_like(x), np.eye(x.shape[1])
    REFERENCE.linear_gelu_forward(act, pre, x, identity, np.zeros(x.shape[1]))
    close(act, g["gelu_y"], 1e-12)
    REFERENCE.gelu_linear_backward(pre, identity.copy(), np.zeros(x.shape[1]), dy, act, x, identity, False)
    close(pre, g["gelu_dx"], 1e-12)

    qkv, NH = g["att_qkv"], int(g["att_heads"])
    B, T, C = g["att_out"].shape
    out, lse, dqkv = np.empty((B, T, C)), np.empty((B, NH, T)), np.empty_like(qkv)
    REFERENCE.attention_forward(out, lse, qkv, NH)
    close(out, g["att_out"], 1e-12)
    REFERENCE.attention_backward(dqkv, g["att_dout"], out, lse, qkv, NH)
    close(dqkv, g["att_dqkv"], 1e-12)

    x, w, targets = g["head_x"], g["head_w"], g["head_targets"]
    V = int(g["head_vocab_size"])
    losses, dx, dw = np.empty(len(x)), np.empty_like(x), np.empty_like(w)
    REFERENCE.head_loss(losses, dx, dw, x, w, targets, V, 1.0 / np.count_nonzero(targets >= 0), False)
    close(losses, g["head_losses"], 1e-12)
    close(dx, g["head_dx"], 1e-12)
    close(dw, g["head_dw"], 1e-12)

    p = g["adamw_start"].copy()
    m, v = np.zeros_like(p), np.zeros_like(p)
    segments = np.array([[0, p.size // 2, 1], [p.size // 2, p.size - p.size // 2, 0]], np.int64)
    for step, (gradients, expected) in enumerate(zip(g["adamw_gradients"], g["adamw_steps"], strict=True), start=1):
        sumsq = np.empty(1)
        REFERENCE.sum_squares(sumsq, gradients)
        hyper = np.array([1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**step, 1 - 0.95**step, 1.0])
        REFERENCE.adamw(p, m, v, gradients, segments, hyper, sumsq)
        # clip_grad_norm_ divides by norm + 1e-6, so its gradients are smaller by about 1e-7; which changes Adam little
        close(p, expected, 1e-7)


def test_reference_matches_pytorch_goldens():
    with np.load(FIXTURES / "kernel_goldens.npz") as goldens:
        compare(dict(goldens))


@pytest.mark.witness
def test_reference_matches_live_pytorch():
    make = runpy.run_path(str(FIXTURES / "make_kernel_goldens.py"))["make"]
    compare(make(seed=2))
