"""Stop texts: found wherever tokens are cut, never let out in part, ids that spell what stands before them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc_cli.errors import DataError, UsageError
from llmc_cli.sampling.stop_strings import StopWatch, spell
from llmc_cli.tokenizer.base import Tokenizer

TOKENS = (b"a", b"b", b"c", b"ab", b"bc", b"abc", b"cab", b"\xc3", b"\xa9", b"b\xc3", b"\xa9a", b"<end>")
END = len(TOKENS) - 1


class Table(Tokenizer):
    def encode(self, text):
        raise NotImplementedError


VOCABULARY = Table("table", TOKENS, END, frozenset((END,)))


def run(ids, stops):
    """The ids let out after each token, those of ``finish`` last, and whether a stop text was found."""
    watch = StopWatch(VOCABULARY, stops)
    parts = []
    for token in ids:
        freed, stopped = watch.feed(token)
        parts.append(freed)
        if stopped:
            return parts, True
    return [*parts, watch.finish()], False


def text(parts):
    return VOCABULARY.decode_bytes([token for part in parts for token in part if token != END])


ids_lists = st.lists(st.integers(0, END), max_size=30)
stop_lists = st.lists(st.text("abcé", min_size=1, max_size=5), min_size=1, max_size=3)


@given(ids_lists, stop_lists)
def test_equals_a_search_in_the_whole_text(ids, stops):
    parts, stopped = run(ids, stops)
    encoded = [stop.encode() for stop in stops]
    whole = b""
    for token in ids:  # a search after each token
        whole += TOKENS[token] if token != END else b""
        if found := [whole.index(stop) for stop in encoded if stop in whole]:
            assert stopped
            assert text(parts) == whole[: min(found)]
            return
    assert not stopped
    assert text(parts) == whole
    assert [token for part in parts for token in part] == ids


@given(ids_lists, stop_lists)
def test_never_lets_out_what_may_begin_a_stop_text(ids, stops):
    parts, _ = run(ids, stops)
    for count in range(len(parts) - 1):
        out = text(parts[: count + 1])
        seen = b"".join(TOKENS[token] for token in ids[: count + 1] if token != END)
        for stop in stops:
            starts = [n for n in range(1, len(stop.encode())) if seen.endswith(stop.encode()[:n])]
            assert len(out) <= len(seen) - max(starts, default=0)


@given(ids_lists)
def test_without_stop_texts_nothing_waits(ids):
    for tokenizer in (VOCABULARY, None):
        watch = StopWatch(tokenizer, [])
        assert [watch.feed(token) for token in ids] == [([token], False) for token in ids]
        assert watch.finish() == []


@pytest.mark.parametrize(
    ("ids", "stops", "wanted"),
    [
        ([0, 1, 2], ["abc"], [[], [], []]),  # over three tokens
        ([0, 0, 1, 2], ["abc"], [[], [0], [], []]),  # the second a may begin it, the first cannot
        ([0, 1, 0], ["abc"], [[], [], [0, 1], [0]]),  # it was none; the last a goes with finish
        ([0, 5], ["bc"], [[0], [0]]),  # in the middle of a token, of which "a" is left
        ([6, 5], ["c"], [[]]),  # at the start of the first token
        ([5, 3], ["c", "b"], [[0]]),  # the one that begins first
        ([0, 9, 10], ["é"], [[0], [], [1]]),  # begins and ends in the middle of tokens
    ],
)
def test_cases(ids, stops, wanted):
    assert run(ids, stops)[0] == wanted


def test_refuses_an_empty_stop_text_and_stop_texts_without_a_tokenizer():
    with pytest.raises(UsageError, match="not empty"):
        StopWatch(VOCABULARY, ["a", ""])
    with pytest.raises(UsageError, match="give --tokenizer"):
        StopWatch(None, ["a"])


def test_refuses_ids_that_the_tokenizer_lacks():
    with pytest.raises(DataError, match="token id 12"):
        StopWatch(VOCABULARY, ["a"]).feed(12)


@given(st.lists(st.sampled_from([0, 1, 2, 7, 8]).map(lambda token: TOKENS[token])).map(b"".join))
def test_spelling(content):
    ids = list(spell(content, VOCABULARY))
    assert VOCABULARY.decode_bytes(ids) == content and END not in ids


def test_spelling_takes_the_longest_and_never_a_special_token():
    assert list(spell(b"cabbcab", VOCABULARY)) == [6, 4, 3]
    with pytest.raises(DataError, match="no token spells b'<'"):
        list(spell(b"a<end>", VOCABULARY))
