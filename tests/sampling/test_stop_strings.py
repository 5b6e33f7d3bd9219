"""Stop strings are found across tokens and never emitted in part; the emitted ids spell the text before them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc_cli.errors import DataError, UsageError
from llmc_cli.sampling.stop_strings import StopStringMatcher, encode_longest_match
from llmc_cli.tokenizer.base import Tokenizer

TOKENS = (b"a", b"b", b"c", b"ab", b"bc", b"abc", b"cab", b"\xc3", b"\xa9", b"b\xc3", b"\xa9a", b"<end>")
END = len(TOKENS) - 1


class Table(Tokenizer):
    def encode(self, text):
        raise NotImplementedError


VOCABULARY = Table("table", TOKENS, END, frozenset((END,)))


def run(ids, stops):
    """Return the ids emitted after each token, then those of ``finish``; and whether a stop string was found."""
    matcher = StopStringMatcher(VOCABULARY, stops)
    parts = []
    for token in ids:
        emitted, stopped = matcher.feed(token)
        parts.append(emitted)
        if stopped:
            return parts, True
    return [*parts, matcher.finish()], False


def text(parts):
    return VOCABULARY.decode_bytes([token for part in parts for token in part if token != END])


ids_lists = st.lists(st.integers(0, END), max_size=30)
stop_lists = st.lists(st.text("abcé", min_size=1, max_size=5), min_size=1, max_size=3)


@given(ids_lists, stop_lists)
def test_equals_a_search_of_the_whole_text(ids, stops):
    parts, stopped = run(ids, stops)
    encoded = [stop.encode() for stop in stops]
    whole = b""
    for token in ids:
        whole += TOKENS[token] if token != END else b""
        if found := [whole.index(stop) for stop in encoded if stop in whole]:
            assert stopped
            assert text(parts) == whole[: min(found)]
            return
    assert not stopped
    assert text(parts) == whole
    assert [token for part in parts for token in part] == ids


@given(ids_lists, stop_lists)
def test_partial_stop_strings_are_held_back(ids, stops):
    parts, _ = run(ids, stops)
    for count in range(len(parts) - 1):
        out = text(parts[: count + 1])
        seen = b"".join(TOKENS[token] for token in ids[: count + 1] if token != END)
        for stop in stops:
            starts = [n for n in range(1, len(stop.encode())) if seen.endswith(stop.encode()[:n])]
            assert len(out) <= len(seen) - max(starts, default=0)


@given(ids_lists)
def test_without_stop_strings_nothing_is_held_back(ids):
    for tokenizer in (VOCABULARY, None):
        matcher = StopStringMatcher(tokenizer, [])
        assert [matcher.feed(token) for token in ids] == [([token], False) for token in ids]
        assert matcher.finish() == []


@pytest.mark.parametrize(
    ("ids", "stops", "expected"),
    [
        ([0, 1, 2], ["abc"], [[], [], []]),  # spans three tokens
        ([0, 0, 1, 2], ["abc"], [[], [0], [], []]),  # only the second a can be the start of abc
        ([0, 1, 0], ["abc"], [[], [], [0, 1], [0]]),  # no match; finish returns the last a
        ([0, 5], ["bc"], [[0], [0]]),  # starts inside a token; "a" remains
        ([6, 5], ["c"], [[]]),  # starts at the first token
        ([5, 3], ["c", "b"], [[0]]),  # the earliest match counts
        ([0, 9, 10], ["é"], [[0], [], [1]]),  # starts and ends inside tokens
    ],
)
def test_emitted_ids(ids, stops, expected):
    assert run(ids, stops)[0] == expected


def test_invalid_stop_strings_are_rejected():
    with pytest.raises(UsageError, match="not empty"):
        StopStringMatcher(VOCABULARY, ["a", ""])
    with pytest.raises(UsageError, match="give --tokenizer"):
        StopStringMatcher(None, ["a"])


def test_ids_outside_the_vocabulary_are_rejected():
    with pytest.raises(DataError, match="token id 12"):
        StopStringMatcher(VOCABULARY, ["a"]).feed(12)


@given(st.lists(st.sampled_from([0, 1, 2, 7, 8]).map(lambda token: TOKENS[token])).map(b"".join))
def test_encode_longest_match(content):
    ids = list(encode_longest_match(content, VOCABULARY))
    assert VOCABULARY.decode_bytes(ids) == content and END not in ids


def test_encode_longest_match_ignores_special_tokens():
    assert list(encode_longest_match(b"cabbcab", VOCABULARY)) == [6, 4, 3]
    with pytest.raises(DataError, match="no token for byte b'<'"):
        list(encode_longest_match(b"a<end>", VOCABULARY))
