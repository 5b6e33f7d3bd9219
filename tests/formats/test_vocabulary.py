"""The tokenizer table: reading and writing."""

import hashlib
import importlib.resources
import struct
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc_cli.formats.errors import MagicError, RangeError, SizeError, VersionError
from llmc_cli.formats.vocabulary import Vocabulary, read_vocabulary, write_vocabulary


def header(*slots):
    return struct.pack("<256i", *slots, *[0] * (256 - len(slots)))


GOLDEN = header(20240328, 2, 3, 1) + b"\x01a\x02\xc3\xa9\x00"
GPT2_SIZED = [bytes([65 + token % 26]) for token in range(50257)]


def test_golden_bytes(tmp_path):
    write_vocabulary(tmp_path / "v", [b"a", b"\xc3\xa9", b""], 1)
    assert (tmp_path / "v").read_bytes() == GOLDEN
    assert read_vocabulary(tmp_path / "v") == Vocabulary([b"a", b"\xc3\xa9", b""], 1, 2)


def test_version_1_has_gpt2_end_of_text(tmp_path):
    write_vocabulary(tmp_path / "v", GPT2_SIZED, 50256, version=1)
    content = header(20240328, 1, 50257) + b"".join(b"\x01" + token for token in GPT2_SIZED)
    assert (tmp_path / "v").read_bytes() == content
    assert read_vocabulary(tmp_path / "v") == Vocabulary(GPT2_SIZED, 50256, 1)


@pytest.mark.parametrize(
    ("version", "digest"),
    [
        (1, "72c44782644dccc955e1b775d0d7552a594bbb54bfc6141e31373324d486956d"),
        (2, "6f3abc21e444e4e8300e225f4e03da48ea121cf17e30f67009b8dad7a66c2f13"),
    ],
)
def test_gpt2_table_matches_llm_c(tmp_path, version, digest):
    with importlib.resources.as_file(importlib.resources.files("llmc_cli.assets") / "gpt2_tokenizer.bin") as path:
        table = read_vocabulary(path)
    write_vocabulary(tmp_path / "v", table.tokens, table.end_of_text, version)
    assert hashlib.sha256((tmp_path / "v").read_bytes()).hexdigest() == digest
    assert read_vocabulary(tmp_path / "v") == table._replace(version=version)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=st.lists(st.binary(max_size=255), min_size=1, max_size=30), data=st.data())
def test_round_trip(tmp_path, tokens, data):
    end_of_text = data.draw(st.integers(0, len(tokens) - 1))
    write_vocabulary(tmp_path / "v", tokens, end_of_text)
    assert read_vocabulary(tmp_path / "v") == Vocabulary(tokens, end_of_text, 2)


@pytest.mark.parametrize("change", [-1, -4, -6, 1, 1000])
def test_truncated_and_oversized_files_are_rejected(tmp_path, change):
    (tmp_path / "v").write_bytes(GOLDEN[:change] if change < 0 else GOLDEN + bytes(change))
    with pytest.raises(SizeError):
        read_vocabulary(tmp_path / "v")


def test_token_length_beyond_the_file_is_rejected(tmp_path):
    (tmp_path / "v").write_bytes(GOLDEN[:1024] + b"\x09a\x02\xc3\xa9\x00")
    with pytest.raises(SizeError, match="the end of the file in token 0"):
        read_vocabulary(tmp_path / "v")


@pytest.mark.parametrize(
    ("slots", "error"),
    [
        ((20240520, 2, 3, 1), MagicError),
        ((20240328, 3, 3, 1), VersionError),
        ((20240328, 2, 0, 0), RangeError),
        ((20240328, 2, -5, 0), RangeError),
        ((20240328, 2, 3, 3), RangeError),
        ((20240328, 2, 3, -1), RangeError),
        ((20240328, 1, 3, 0), RangeError),
        ((20240328, 2, 2**31 - 1, 2**31 - 2), SizeError),
    ],
)
def test_invalid_headers_are_rejected_without_allocating(tmp_path, slots, error):
    (tmp_path / "v").write_bytes(header(*slots) + GOLDEN[1024:])
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read_vocabulary(tmp_path / "v")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_invalid_tables_are_not_written(tmp_path):
    with pytest.raises(RangeError, match="256"):
        write_vocabulary(tmp_path / "v", [bytes(256)], 0)
    with pytest.raises(RangeError, match="end-of-text"):
        write_vocabulary(tmp_path / "v", [b"a"], 1)
    with pytest.raises(RangeError, match="use version 2"):
        write_vocabulary(tmp_path / "v", [b"a"], 0, version=1)
    with pytest.raises(VersionError):
        write_vocabulary(tmp_path / "v", [b"a"], 0, version=3)
    assert list(tmp_path.iterdir()) == []
