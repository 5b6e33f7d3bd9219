"""Generation is compared with transformers, with forward passes without a cache, and across batch sizes."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
from support.paths import FIXTURES

from llmc_cli.errors import DataError, UsageError
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.files import load_model
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.sampling import generation
from llmc_cli.sampling.filters import sample_generator, sample_token
from llmc_cli.sampling.generation import Decoder, generate, resolve_max_tokens, sample_tokens
from llmc_cli.sampling.options import SamplingOptions

GOLDEN = json.loads((FIXTURES / "sampling_golden.json").read_text())
GREEDY = SamplingOptions(temperature=0)


@pytest.fixture(scope="module")
def model():
    return load_model(FIXTURES / "sampling_model.bin", ReferenceKernels())


def ids_of(chunks, sample=0):
    return [token for chunk in chunks if chunk.sample == sample for token in chunk.ids]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"prompt{len(case['prompt'])}")
def test_greedy_equals_transformers(model, case):
    chunks = list(generate(model, case["prompt"], GREEDY, 64))
    assert ids_of(chunks) == case["ids"]
    assert [chunk.finish_reason for chunk in chunks] == [""] * 63 + ["length"]


@pytest.mark.parametrize("chunk", [1, 5, 256])
def test_cached_logits_equal_uncached_logits(model, chunk, monkeypatch):
    monkeypatch.setattr(generation, "PREFILL_CHUNK", chunk)
    ids = np.random.default_rng(0).integers(0, 120, 96).astype(np.int32)
    model.prepare(1, 96, train=False)
    model.forward(ids[None])
    whole = model.logits(slice(None))  # (96, V)
    decoder = Decoder(model, KVCache(model.config, model.kernels, 1, 96, 40))
    found = [decoder.prefill(ids[:40].tolist()).copy()]
    found += [decoder.step([token]).copy() for token in ids[40:].tolist()]
    assert np.abs(np.concatenate(found) - whole[39:]).max() < 1e-10


def test_cached_logits_of_float32_kernels(model, backend):
    ours = load_model(FIXTURES / "sampling_model.bin", backend.kernels)
    ids = np.random.default_rng(1).integers(0, 120, (1, 96)).astype(np.int32)
    for each in (ours, model):
        each.prepare(1, 96, train=False)
        each.forward(ids)
    decoder = Decoder(ours, KVCache(ours.config, ours.kernels, 1, 96, 30))
    found = [decoder.prefill(ids[0, :30].tolist()).copy()]
    found += [decoder.step([token]).copy() for token in ids[0, 30:].tolist()]
    assert np.abs(np.concatenate(found) - ours.logits(slice(29, None))).max() < 1e-4
    assert np.abs(np.concatenate(found) - model.logits(slice(29, None))).max() < 1e-4
    for case in GOLDEN:
        assert ids_of(generate(ours, case["prompt"], GREEDY, 64)) == case["ids"]


def naive_samples(model, prompt, options, count, sample):
    """Generate tokens with a full forward pass over the sequence for each."""
    ids, generator = list(prompt), sample_generator(options.seed, sample)
    for _ in range(count):
        model.prepare(1, len(ids), train=False)
        model.forward(np.array([ids], np.int32))
        logits = model.logits(slice(len(ids) - 1, None))[0]
        ids.append(sample_token(logits, options, generator))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "options", [GREEDY, SamplingOptions(), SamplingOptions(temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, seed=5)]
)
def test_samples_equal_naive_samples_for_any_batch_size(model, options, monkeypatch):
    prompt = [4, 8, 15]
    expected = [naive_samples(model, prompt, options, 12, sample) for sample in range(5)]
    for num, batch_size in ((1, 32), (2, 32), (5, 32), (5, 1), (5, 2)):
        monkeypatch.setattr(generation, "MAX_BATCH", batch_size)
        chunks = list(generate(model, prompt, options, 12, num))
        assert [ids_of(chunks, sample) for sample in range(num)] == expected[:num]
        assert sorted(chunk.sample for chunk in chunks if chunk.finish_reason) == list(range(num))
    assert options == GREEDY or len({tuple(ids) for ids in expected}) == 5


def test_cache_memory_is_bounded(model, monkeypatch):
    monkeypatch.setattr(generation, "MAX_CACHE_BYTES", 3 * generation._cache_bytes(model, 12) + 1)
    sizes = []

    def record_size(config, kernels, S, T, R):
        sizes.append((S, T, R))
        return KVCache(config, kernels, S, T, R)

    monkeypatch.setattr(generation, "KVCache", record_size)
    list(generate(model, [1, 2, 3], SamplingOptions(), 10, num=7))
    assert sizes == [(1, 3, 3), (3, 12, 3), (3, 12, 3), (1, 12, 1)]


def test_equal_seeds_give_equal_samples(model):
    first, again, other = (ids_of(generate(model, [1], SamplingOptions(seed=seed), 30)) for seed in (1337, 1337, 1338))
    assert first == again != other


def test_samples_can_fill_the_context(model):
    prompt = list(range(90))
    assert len(ids_of(generate(model, prompt, GREEDY))) == 6
    assert len(ids_of(generate(model, list(range(95)), GREEDY, 1))) == 1
    assert ids_of(generate(model, prompt, GREEDY, 6, num=2), 1) == naive_samples(model, prompt, GREEDY, 6, 0)


def test_resolve_max_tokens(model):
    config = replace(model.config, max_seq_len=1024)
    assert resolve_max_tokens(config, [1], None) == 256
    assert resolve_max_tokens(config, [1] * 1000, None) == 24
    assert resolve_max_tokens(config, [1], 1023) == 1023
    with pytest.raises(UsageError, match=r"--max-tokens 1024.*1025 tokens.*holds 1024.*at most 1023"):
        resolve_max_tokens(config, [1], 1024)
    with pytest.raises(UsageError, match="leave no room in the model's context of 1024"):
        resolve_max_tokens(config, [1] * 1024, None)
    with pytest.raises(UsageError, match="expected 1 or more"):
        resolve_max_tokens(config, [1], 0)
    with pytest.raises(UsageError, match="prompt is empty"):
        resolve_max_tokens(config, [], None)
    for bad in (-1, 120):
        with pytest.raises(UsageError, match=f"token id {bad} is outside the model's vocabulary, 0 to 119"):
            resolve_max_tokens(config, [3, bad], None)


def test_usage_errors_are_raised_by_the_call(model):
    with pytest.raises(UsageError, match="--max-tokens 96"):
        generate(model, [1], GREEDY, 96)


def test_sample_tokens(model):
    cache = KVCache(model.config, model.kernels, 1, 40, 1)
    found = sample_tokens(model, cache, 119, 40)
    assert found == sample_tokens(model, cache, 119, 40)  # the cache and the generator are reset
    assert found == naive_samples(model, [119], SamplingOptions(), 39, 0)
    assert found != sample_tokens(model, cache, 119, 40, seed=7)
    assert sample_tokens(model, cache, 119, 1) == []


def test_non_finite_weights_are_reported(model):
    broken = load_model(FIXTURES / "sampling_model.bin", ReferenceKernels())
    broken.params["lnfb"][3] = np.nan
    broken.publish()
    with pytest.raises(DataError, match="llmc verify"):
        list(generate(broken, [1], SamplingOptions()))


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
        expected, _ = script.greedy(witness, prompt)
        assert ids_of(generate(ours, prompt, GREEDY, script.NUM_TOKENS)) == expected
        if seed == script.SEED:
            assert expected == GOLDEN[index]["ids"]
