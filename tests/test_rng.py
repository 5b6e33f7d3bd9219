import numpy as np
import pytest
from support.paths import FIXTURES

from llmc_cli.rng import MersenneTwister, Xorshift


def test_words_equal_mt19937():
    # first outputs of the reference implementation mt19937ar.c after init_genrand(5489)
    assert MersenneTwister(5489).words(3).tolist() == [3499211612, 581869302, 3890346734]


def test_normals_equal_pytorch():
    # torch.manual_seed(42); torch.empty(20).normal_(0, 0.02); 20 % 16 != 0: the last 16 are drawn again
    golden = np.load(FIXTURES / "normals.npz")
    out = np.empty(20, np.float32)
    generator = MersenneTwister(42)
    generator.fill_normal(out, 0.02)
    np.testing.assert_allclose(out, golden["twenty"], rtol=0, atol=4.5e-8)
    out = np.empty(64, np.float32)
    generator.fill_normal(out, 1.0)
    np.testing.assert_allclose(out, golden["then_64"], rtol=0, atol=2.3e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_normals_do_not_depend_on_chunks_or_threads(monkeypatch, threads):
    whole = np.empty(16 * 5 + 3, np.float32)
    MersenneTwister(1).fill_normal(whole, 1.0)
    monkeypatch.setattr("llmc_cli.rng.CHUNK", 32)
    chunked = np.empty_like(whole)
    MersenneTwister(1).fill_normal(chunked, 1.0, threads)
    np.testing.assert_array_equal(whole, chunked)


def test_fewer_than_16_normals():
    out = np.empty(3, np.float32)
    MersenneTwister(1).fill_normal(out, 1.0)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("draws", [0, 1, 623, 624, 625, 1000])
def test_restored_state_continues_the_sequence(draws):
    generator = MersenneTwister(42)
    generator.words(draws)
    words, position = generator.state
    other = MersenneTwister(7)
    other.state = words, position
    np.testing.assert_array_equal(other.words(700), generator.words(700))


def test_state_counts_drawn_words():
    generator = MersenneTwister(42)
    assert generator.state[1] == 0
    generator.words(1)
    assert generator.state[1] == 1
    generator.words(623)
    assert generator.state[1] == 624
    generator.words(1)
    assert generator.state[1] == 1


def test_permute_swaps_from_the_end():
    words = MersenneTwister(42).words(9).tolist()
    expected = list(range(10))
    for word, i in zip(words, range(9, 0, -1), strict=True):
        j = word % (i + 1)
        expected[i], expected[j] = expected[j], expected[i]
    order = np.arange(10, dtype=np.int32)
    MersenneTwister(42).permute(order)
    assert order.tolist() == expected


def test_permute_of_one_element_draws_nothing():
    generator = MersenneTwister(42)
    generator.permute(np.zeros(1, np.int32))
    assert generator.state[1] == 0


def test_xorshift_equals_its_definition():
    state = 1337
    state ^= state >> 12
    state ^= (state << 25) % 2**64
    state ^= state >> 27
    generator = Xorshift(1337)
    assert generator.word() == (state * 0x2545F4914F6CDD1D % 2**64) >> 32
    assert generator.state == state


def test_xorshift_uniform_is_a_float32():
    generator = Xorshift(1337)
    values = [generator.uniform() for _ in range(1000)]
    assert all(0 <= value < 1 and float(np.float32(value)) == value for value in values)
    assert 0.45 < sum(values) / 1000 < 0.55
