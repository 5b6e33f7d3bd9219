"""Picks and filters against naive ones, the cache against none, batches against single samples, and transformers."""

import importlib.util
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.paths import FIXTURES

from llmc_cli.errors import DataError, UsageError
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.files import load_model
from llmc_cli.models.kv_cache import Cache
from llmc_cli.rng import Xorshift
from llmc_cli.sampling import filters, generation
from llmc_cli.sampling.filters import Settings, choose, filtered, generator, pick
from llmc_cli.sampling.generation import Stepper, fit, generate, sample_tokens

GOLDEN = json.loads((FIXTURES / "sampling_golden.json").read_text())
GREEDY = Settings(temperature=0)


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "sampling_model.bin", ReferenceKernels())


def ids_of(pieces, sample=0):
    return [token for piece in pieces if piece.sample == sample for token in piece.ids]


def logits_arrays(low=-20, high=20, width=32):
    """Logits with many equal ones among them."""
    elements = st.one_of(st.integers(low, high).map(float), st.floats(low, high, width=width))
    return hnp.arrays(f"float{width}", st.integers(1, 40), elements=elements)


def c_pick(logits, coin):
    """The C trainer's loop, in float32 but for the sum that the coin is multiplied with."""
    weights = [np.exp(np.float32(logit)) for logit in logits]
    norm = 0.0
    for weight in weights:
        norm += float(weight)
    threshold, cdf = np.float32(coin * norm), np.float32(0)
    for index, weight in enumerate(weights):
        cdf = np.float32(cdf + weight)
        if threshold < cdf:
            return index
    return len(logits) - 1


coins = st.integers(0, 2**24 - 1).map(lambda word: word / 2**24)


@given(logits_arrays(), coins)
def test_pick_is_the_c_trainers(logits, coin):
    assert pick(logits, coin) == c_pick(logits, coin)


@given(logits_arrays(-1000, 1000, width=64), coins)
def test_pick_of_wide_logits(logits, coin):
    weights = np.exp(logits - logits.max())
    total, reached = weights.sum(), np.cumsum(weights)
    token = pick(logits, coin)
    assert reached[token] >= coin * total * (1 - 1e-5)
    assert reached[token] - weights[token] <= coin * total * (1 + 1e-5)


def test_pick_at_the_end_takes_what_a_filter_has_left():
    logits = np.array([0.1] * 7 + [-np.inf, -np.inf], np.float32)
    assert {pick(logits, coin) for coin in np.arange(0, 1, 2**-10)} == set(range(7))
    assert pick(logits, 1.0) == 6  # what rounding makes of coins close to 1
    assert pick(logits[:7], 1.0) == 6


def test_pick_follows_the_probabilities():
    logits = np.log(np.array([0.5, 0.125, 0.25, 0.125], np.float32))
    coins = Xorshift(1337)
    counts = np.bincount([pick(logits, coins.uniform()) for _ in range(4000)], minlength=4)
    assert np.abs(counts / 4000 - [0.5, 0.125, 0.25, 0.125]).max() < 0.03


@given(logits_arrays())
def test_greedy_is_the_first_of_the_largest(logits):
    assert choose(logits, GREEDY, Xorshift(1)) == logits.tolist().index(max(logits))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_refuses_logits_that_are_not_finite(bad, temperature):
    logits = np.zeros(9, np.float32)
    logits[5] = bad
    with pytest.raises(DataError, match="not finite"):
        choose(logits, Settings(temperature=temperature), Xorshift(1))
    with pytest.raises(DataError, match="not finite"):
        choose(np.full(9, -np.inf), Settings(temperature=temperature), Xorshift(1))


def by_likelihood(logits):
    """Ids, the likeliest first, of equal ones the lower id."""
    return sorted(range(len(logits)), key=lambda index: (-logits[index], index))


def kept(logits):
    return set(np.flatnonzero(logits > -np.inf).tolist())


@given(logits_arrays(), st.integers(1, 50))
def test_top_k(logits, k):
    found = filters.keep_top_k(logits, k)
    assert kept(found) == set(by_likelihood(logits)[:k])
    assert found.dtype == logits.dtype and all(found[index] == logits[index] for index in kept(found))


@given(logits_arrays(width=64), st.floats(0.01, 0.99))
def test_top_p(logits, p):
    weights = [math.exp(logit - max(logits)) for logit in logits.tolist()]
    wanted, mass = [], 0.0
    for index in by_likelihood(logits):
        wanted.append(index)
        mass += weights[index] / math.fsum(weights)
        if mass >= p:
            break
    found = kept(filters.keep_top_p(logits, p))
    edge = mass - weights[wanted[-1]] / math.fsum(weights)
    if min(mass - p, p - edge) > 1e-12:  # else rounding decides
        assert found == set(wanted)
    else:
        assert abs(len(found) - len(wanted)) <= 1


@given(logits_arrays(width=64), st.floats(0.01, 1.0))
def test_min_p(logits, p):
    shares = [math.exp(logit - max(logits)) for logit in logits.tolist()]
    found = kept(filters.keep_min_p(logits, p))
    assert found >= {index for index, share in enumerate(shares) if share >= p * (1 + 1e-12)}
    assert found <= {index for index, share in enumerate(shares) if share >= p * (1 - 1e-12)}


@given(logits_arrays(), st.floats(0.01, 10))
def test_temperature(logits, temperature):
    wanted = [(float(logit) - float(logits.max())) / temperature for logit in logits]
    found = filters.scale(logits, temperature)
    probabilities, naive = (np.exp(x - np.max(x)) for x in (found.astype(np.float64), np.array(wanted)))
    assert np.allclose(probabilities / probabilities.sum(), naive / naive.sum(), atol=1e-5)


def test_a_temperature_near_0_is_greedy():
    logits = np.array([1.0, 3.0, -5.0, 2.9999], np.float32)
    for temperature in (1e-5, 1e-40, 1e-300):
        assert {pick(filtered(logits, Settings(temperature)), coin) for coin in np.arange(0, 1, 0.01)} == {1}


@given(
    logits_arrays(),
    st.floats(0.1, 3),
    st.integers(1, 10),
    st.floats(0.1, 1.0),
    st.floats(0.0, 0.9),
    coins,
)
def test_filters_work_one_after_the_other(logits, temperature, top_k, top_p, min_p, coin):
    found = filtered(logits, Settings(temperature, top_k, top_p, min_p))
    step = filters.keep_top_k(filters.scale(logits, temperature), top_k)
    step = filters.keep_top_p(step, top_p) if top_p < 1 else step
    step = filters.keep_min_p(step, min_p) if min_p > 0 else step
    assert np.array_equal(found, step)
    assert int(np.argmax(logits)) in kept(found)
    assert pick(found, coin) in kept(found)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_refuses_settings_out_of_range(values):
    with pytest.raises(UsageError, match="--" + next(iter(values)).replace("_", "-")):
        Settings(**values)


def test_generators_differ_and_stay():
    assert [generator(1337, 0).word() for _ in range(3)] == [Xorshift(1337).word()] * 3
    starts = [generator(seed, sample).uniform() for seed in (0, 1, 1337) for sample in range(200)]
    assert len(set(starts)) == 600
    histogram, _ = np.histogram(starts, bins=10, range=(0, 1))
    assert histogram.min() > 35
    from_zero = generator(0, 0)
    assert len({from_zero.uniform() for _ in range(5)}) == 5


# with a model


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"prompt{len(case['prompt'])}")
def test_greedy_equals_transformers(model, case):
    pieces = list(generate(model, case["prompt"], GREEDY, 64))
    assert ids_of(pieces) == case["ids"]
    assert [piece.ending for piece in pieces] == [""] * 63 + ["length"]


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_logits_with_and_without_cache_agree(model, chunk, monkeypatch):
    monkeypatch.setattr(generation, "PROMPT_ROWS", chunk)
    ids = np.random.default_rng(0).integers(0, 120, 96).astype(np.int32)
    model.prepare(1, 96, train=False)
    model.forward(ids[None])
    whole = model.logits(slice(None))  # (96, V)
    stepper = Stepper(model, Cache(model, 1, 96, 40))
    found = [stepper.read(ids[:40].tolist()).copy()]
    found += [stepper.step([token]).copy() for token in ids[40:].tolist()]
    assert np.abs(np.concatenate(found) - whole[39:]).max() < 1e-10


def test_float32_kernels_agree_with_and_without_cache(model, backend):
    ours = load_model(FIXTURES / "sampling_model.bin", backend.kernels)
    ids = np.random.default_rng(1).integers(0, 120, (1, 96)).astype(np.int32)
    for either in (ours, model):
        either.prepare(1, 96, train=False)
        either.forward(ids)
    stepper = Stepper(ours, Cache(ours, 1, 96, 30))
    found = [stepper.read(ids[0, :30].tolist()).copy()]
    found += [stepper.step([token]).copy() for token in ids[0, 30:].tolist()]
    assert np.abs(np.concatenate(found) - ours.logits(slice(29, None))).max() < 1e-4
    assert np.abs(np.concatenate(found) - model.logits(slice(29, None))).max() < 1e-4
    for case in GOLDEN:
        assert ids_of(generate(ours, case["prompt"], GREEDY, 64)) == case["ids"]


def naive_samples(model, prompt, settings, count, sample):
    """Tokens by whole forward passes over the growing sequence."""
    ids, coins = list(prompt), generator(settings.seed, sample)
    for _ in range(count):
        model.prepare(1, len(ids), train=False)
        model.forward(np.array([ids], np.int32))
        logits = model.logits(slice(len(ids) - 1, None))[0]
        ids.append(choose(logits, settings, coins))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "settings", [GREEDY, Settings(), Settings(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=5)]
)
def test_samples_equal_naive_ones_and_do_not_depend_on_their_number(model, settings, monkeypatch):
    prompt = [4, 8, 15]
    wanted = [naive_samples(model, prompt, settings, 12, sample) for sample in range(5)]
    for num, together in ((1, 32), (2, 32), (5, 32), (5, 1), (5, 2)):
        monkeypatch.setattr(generation, "MOST_TOGETHER", together)
        pieces = list(generate(model, prompt, settings, 12, num))
        assert [ids_of(pieces, sample) for sample in range(num)] == wanted[:num]
        assert sorted(piece.sample for piece in pieces if piece.ending) == list(range(num))
    assert settings == GREEDY or len({tuple(ids) for ids in wanted}) == 5


def test_caches_are_bounded(model, monkeypatch):
    monkeypatch.setattr(generation, "CACHE_BYTES", 3 * generation._cache_bytes(model, 12) + 1)
    sizes = []
    monkeypatch.setattr(generation, "Cache", lambda model, S, T, R: (sizes.append((S, T, R)), Cache(model, S, T, R))[1])
    list(generate(model, [1, 2, 3], Settings(), 10, num=7))
    assert sizes == [(1, 3, 3), (3, 12, 3), (3, 12, 3), (1, 12, 1)]


def test_seeds_repeat(model):
    first, again, other = (ids_of(generate(model, [1], Settings(seed=seed), 30)) for seed in (1337, 1337, 1338))
    assert first == again != other


def test_fills_the_context_to_the_last_position(model):
    prompt = list(range(90))
    assert len(ids_of(generate(model, prompt, GREEDY))) == 6
    assert len(ids_of(generate(model, list(range(95)), GREEDY, 1))) == 1
    assert ids_of(generate(model, prompt, GREEDY, 6, num=2), 1) == naive_samples(model, prompt, GREEDY, 6, 0)


def test_how_many_tokens(model):
    config = replace(model.config, max_seq_len=1024)
    assert fit(config, [1], None) == 256
    assert fit(config, [1] * 1000, None) == 24
    assert fit(config, [1], 1023) == 1023
    with pytest.raises(UsageError, match=r"--max-tokens 1024.*1025 tokens.*holds 1024.*at most 1023"):
        fit(config, [1], 1024)
    with pytest.raises(UsageError, match="leave no room in the model's context of 1024"):
        fit(config, [1] * 1024, None)
    with pytest.raises(UsageError, match="expected 1 or more"):
        fit(config, [1], 0)
    with pytest.raises(UsageError, match="nothing to start from"):
        fit(config, [], None)
    for bad in (-1, 120):
        with pytest.raises(UsageError, match=f"token id {bad} is outside the model's vocabulary, 0 to 119"):
            fit(config, [3, bad], None)


def test_refuses_before_the_first_token(model):
    with pytest.raises(UsageError, match="--max-tokens 96"):
        generate(model, [1], GREEDY, 96)


def test_the_trainers_samples(model):
    cache = Cache(model, 1, 40, 1)
    found = sample_tokens(model, cache, 119, 40)
    assert found == sample_tokens(model, cache, 119, 40)  # the cache is emptied, the generator starts anew
    assert found == naive_samples(model, [119], Settings(), 39, 0)
    assert found != sample_tokens(model, cache, 119, 40, seed=7)
    assert sample_tokens(model, cache, 119, 1) == []


def test_sees_bad_weights(model):
    broken = load_model(FIXTURES / "sampling_model.bin", ReferenceKernels())
    broken.params["lnfb"][3] = np.nan
    broken.publish()
    with pytest.raises(DataError, match="llmc verify"):
        list(generate(broken, [1], Settings()))


# live witness


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_sampling_golden", FIXTURES / "make_sampling_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.witness
@pytest.mark.parametrize("seed", [5, 11, 12])
def test_greedy_equals_live_transformers(script, seed, tmp_path):
    witness = script.make_model(seed)
    path = tmp_path / "model.bin"
    script.save(path, witness)
    if seed == script.SEED:
        assert path.read_bytes() == (FIXTURES / "sampling_model.bin").read_bytes()
    ours = load_model(path, ReferenceKernels())
    for index, prompt in enumerate(script.PROMPTS):
        wanted, _ = script.greedy(witness, prompt)
        assert ids_of(generate(ours, prompt, GREEDY, script.NUM_TOKENS)) == wanted
        if seed == script.SEED:
            assert wanted == GOLDEN[index]["ids"]
