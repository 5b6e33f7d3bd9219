"""Reading evaluation sets."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.evalsets import write_evalset

from llmc_cli.formats.errors import MagicError, RangeError, SizeError, VersionError
from llmc_cli.formats.evalset import EvalHeader, Example, read_evalset

FIRST = [65535, 40, 0, 2, 4, 3, 50256, 7, 8, 1, 11, 2, 21, 22, 1, 31, 3, 41, 42, 43]
SECOND = [65535, 30, 1, 0, 4, 1, 5, 1, 1, 1, 2, 1, 3, 1, 4]


def file_of(*examples, count=None, longest=40):
    count = len(examples) if count is None else count
    words = [word for example in examples for word in example]
    return struct.pack("<256i", 20240522, 1, count, longest, *[0] * 252) + struct.pack(f"<{len(words)}H", *words)


GOLDEN = file_of(FIRST, SECOND)


def ids(*tokens):
    return np.array(tokens, np.uint16)


def to_lists(example):
    return (example.context.tolist(), [text.tolist() for text in example.completions], example.label, example.index)


def with_word(word, value):
    """Return the golden file with one word of its first example replaced."""
    return file_of([*FIRST[:word], value, *FIRST[word + 1 :]], SECOND)


def test_golden_bytes(tmp_path):
    examples = [
        Example(ids(50256, 7, 8), [ids(11), ids(21, 22), ids(31), ids(41, 42, 43)], 2, 0),
        Example(ids(5), [ids(1), ids(2), ids(3), ids(4)], 0, 1),
    ]
    write_evalset(tmp_path / "e", examples)
    assert (tmp_path / "e").read_bytes() == GOLDEN
    found = read_evalset(tmp_path / "e")
    assert found.header == EvalHeader(20240522, 1, 2, 40)
    assert len(found) == 2
    assert [to_lists(example) for example in found] == [to_lists(example) for example in examples]
    assert found.path == tmp_path / "e"


texts = st.lists(st.integers(0, 65535), min_size=1, max_size=8).map(lambda tokens: np.array(tokens, np.uint16))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.builds(
            Example, texts, st.lists(texts, min_size=4, max_size=4), st.integers(0, 3), index=st.integers(0, 65535)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_round_trip(tmp_path, examples):
    write_evalset(tmp_path / "e", examples)
    found = read_evalset(tmp_path / "e")
    assert [to_lists(example) for example in found] == [to_lists(example) for example in examples]
    found.check(1 << 16)


@pytest.mark.parametrize("change", [-2, -1, -30, -60, 1, 2, 20])
def test_truncated_and_oversized_files_are_rejected(tmp_path, change):
    (tmp_path / "e").write_bytes(GOLDEN[:change] if change < 0 else GOLDEN + bytes(change))
    with pytest.raises(SizeError):
        list(read_evalset(tmp_path / "e"))


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"\0" * 1024, MagicError),
        (struct.pack("<256i", 20240522, 2, *[0] * 254), VersionError),
        (file_of(FIRST, SECOND, count=0), RangeError),
        (file_of(FIRST, SECOND, count=-1), RangeError),
        (file_of(FIRST, SECOND, count=3), SizeError),
        (file_of(FIRST, SECOND, count=1, longest=80), SizeError),
        (file_of(FIRST, SECOND, count=2**31 - 1), SizeError),
        (file_of(FIRST, SECOND, longest=2**31 - 1), RangeError),
        (file_of(FIRST, SECOND, longest=0), RangeError),
        (file_of(FIRST, SECOND, longest=38), RangeError),
        (file_of(FIRST, SECOND, longest=42), RangeError),
        (with_word(0, 65534), RangeError),
        (with_word(1, 42), RangeError),
        (with_word(1, 38), RangeError),
        (with_word(1, 39), RangeError),
        (with_word(1, 0), RangeError),
        (with_word(3, 4), RangeError),
        (with_word(4, 3), RangeError),
        (with_word(5, 0), RangeError),
        (with_word(5, 4), RangeError),
        (with_word(5, 65535), RangeError),
        (with_word(16, 2), RangeError),
        (with_word(16, 4), RangeError),
    ],
)
def test_invalid_values_are_rejected_without_allocating(tmp_path, content, error):
    (tmp_path / "e").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error):
            list(read_evalset(tmp_path / "e"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_check_reports_the_position_of_an_invalid_token_id(tmp_path):
    (tmp_path / "e").write_bytes(GOLDEN)
    read_evalset(tmp_path / "e").check(50257)
    with pytest.raises(RangeError, match=r"token id 50256 at example 0 context\[0\]"):
        read_evalset(tmp_path / "e").check(50256)
    (tmp_path / "e").write_bytes(with_word(19, 60000))
    with pytest.raises(RangeError, match=r"token id 60000 at example 0 completion 3\[2\]"):
        read_evalset(tmp_path / "e").check(50257)
