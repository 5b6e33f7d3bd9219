"""Filters and draws are compared with naive implementations, and with llm.c's sampling loop."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from llmc_cli.errors import DataError, UsageError
from llmc_cli.rng import Xorshift
from llmc_cli.sampling import filters
from llmc_cli.sampling.filters import apply_filters, sample_generator, sample_softmax, sample_token
from llmc_cli.sampling.options import SamplingOptions


def logits_arrays(low=-20, high=20, width=32):
    """Logits, many of them equal."""
    elements = st.one_of(st.integers(low, high).map(float), st.floats(low, high, width=width))
    return hnp.arrays(f"float{width}", st.integers(1, 40), elements=elements)


def llmc_sample_softmax(logits, coin):
    """llm.c's loop: float32, except for the sum that the coin is multiplied with."""
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
def test_sample_softmax_equals_llmc(logits, coin):
    assert sample_softmax(logits, coin) == llmc_sample_softmax(logits, coin)


@given(logits_arrays(-1000, 1000, width=64), coins)
def test_sample_softmax_of_large_logits(logits, coin):
    weights = np.exp(logits - logits.max())
    total, cumulative = weights.sum(), np.cumsum(weights)
    token = sample_softmax(logits, coin)
    assert cumulative[token] >= coin * total * (1 - 1e-5)
    assert cumulative[token] - weights[token] <= coin * total * (1 + 1e-5)


def test_sample_softmax_never_returns_filtered_tokens():
    logits = np.array([0.1] * 7 + [-np.inf, -np.inf], np.float32)
    assert {sample_softmax(logits, coin) for coin in np.arange(0, 1, 2**-10)} == set(range(7))
    assert sample_softmax(logits, 1.0) == 6  # coins close to 1 may round to 1
    assert sample_softmax(logits[:7], 1.0) == 6


def test_sample_softmax_follows_the_probabilities():
    logits = np.log(np.array([0.5, 0.125, 0.25, 0.125], np.float32))
    generator = Xorshift(1337)
    counts = np.bincount([sample_softmax(logits, generator.uniform()) for _ in range(4000)], minlength=4)
    assert np.abs(counts / 4000 - [0.5, 0.125, 0.25, 0.125]).max() < 0.03


@given(logits_arrays())
def test_greedy_returns_the_first_largest_logit(logits):
    assert sample_token(logits, SamplingOptions(temperature=0), Xorshift(1)) == logits.tolist().index(max(logits))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_sample_token_rejects_non_finite_logits(bad, temperature):
    logits = np.zeros(9, np.float32)
    logits[5] = bad
    with pytest.raises(DataError, match="not finite"):
        sample_token(logits, SamplingOptions(temperature=temperature), Xorshift(1))
    with pytest.raises(DataError, match="not finite"):
        sample_token(np.full(9, -np.inf), SamplingOptions(temperature=temperature), Xorshift(1))


def ids_by_likelihood(logits):
    """Ids from the most to the least likely; equal logits by ascending id."""
    return sorted(range(len(logits)), key=lambda index: (-logits[index], index))


def remaining_ids(logits):
    return set(np.flatnonzero(logits > -np.inf).tolist())


@given(logits_arrays(), st.integers(1, 50))
def test_top_k(logits, k):
    found = filters.keep_top_k(logits, k)
    assert remaining_ids(found) == set(ids_by_likelihood(logits)[:k])
    assert found.dtype == logits.dtype and all(found[index] == logits[index] for index in remaining_ids(found))


@given(logits_arrays(width=64), st.floats(0.01, 0.99))
def test_top_p(logits, p):
    weights = [math.exp(logit - max(logits)) for logit in logits.tolist()]
    expected, mass = [], 0.0
    for index in ids_by_likelihood(logits):
        expected.append(index)
        mass += weights[index] / math.fsum(weights)
        if mass >= p:
            break
    found = remaining_ids(filters.keep_top_p(logits, p))
    mass_before_last = mass - weights[expected[-1]] / math.fsum(weights)
    if min(mass - p, p - mass_before_last) > 1e-12:  # otherwise rounding decides
        assert found == set(expected)
    else:
        assert abs(len(found) - len(expected)) <= 1


@given(logits_arrays(width=64), st.floats(0.01, 1.0))
def test_min_p(logits, p):
    ratios = [math.exp(logit - max(logits)) for logit in logits.tolist()]
    found = remaining_ids(filters.keep_min_p(logits, p))
    assert found >= {index for index, ratio in enumerate(ratios) if ratio >= p * (1 + 1e-12)}
    assert found <= {index for index, ratio in enumerate(ratios) if ratio >= p * (1 - 1e-12)}


@given(logits_arrays(), st.floats(0.01, 10))
def test_temperature(logits, temperature):
    expected = [(float(logit) - float(logits.max())) / temperature for logit in logits]
    found = filters.apply_temperature(logits, temperature)
    probabilities, naive = (np.exp(x - np.max(x)) for x in (found.astype(np.float64), np.array(expected)))
    assert np.allclose(probabilities / probabilities.sum(), naive / naive.sum(), atol=1e-5)


def test_temperature_near_zero_is_greedy():
    logits = np.array([1.0, 3.0, -5.0, 2.9999], np.float32)
    for temperature in (1e-5, 1e-40, 1e-300):
        assert {
            sample_softmax(apply_filters(logits, SamplingOptions(temperature)), coin) for coin in np.arange(0, 1, 0.01)
        } == {1}


@given(
    logits_arrays(),
    st.floats(0.1, 3),
    st.integers(1, 10),
    st.floats(0.1, 1.0),
    st.floats(0.0, 0.9),
    coins,
)
def test_filters_apply_in_order(logits, temperature, top_k, top_p, min_p, coin):
    found = apply_filters(logits, SamplingOptions(temperature, top_k, top_p, min_p))
    result = filters.keep_top_k(filters.apply_temperature(logits, temperature), top_k)
    result = filters.keep_top_p(result, top_p) if top_p < 1 else result
    result = filters.keep_min_p(result, min_p) if min_p > 0 else result
    assert np.array_equal(found, result)
    assert int(np.argmax(logits)) in remaining_ids(found)
    assert sample_softmax(found, coin) in remaining_ids(found)


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
def test_options_out_of_range_are_rejected(values):
    with pytest.raises(UsageError, match="--" + next(iter(values)).replace("_", "-")):
        SamplingOptions(**values)


def test_sample_generators_are_distinct_and_reproducible():
    assert [sample_generator(1337, 0).word() for _ in range(3)] == [Xorshift(1337).word()] * 3
    starts = [sample_generator(seed, sample).uniform() for seed in (0, 1, 1337) for sample in range(200)]
    assert len(set(starts)) == 600
    histogram, _ = np.histogram(starts, bins=10, range=(0, 1))
    assert histogram.min() > 35
    from_zero = sample_generator(0, 0)
    assert len({from_zero.uniform() for _ in range(5)}) == 5
