import io
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.text_tokenizers import gpt2_tokenizer

from llmc_cli.data import documents
from llmc_cli.data.documents import Piece, check_files, input_bytes, read_documents, split_point
from llmc_cli.data.tinyshakespeare import shakespeare_text
from llmc_cli.errors import DataError, MissingError, UsageError


def read(path, content):
    path.write_bytes(content)
    return list(read_documents([str(path)], io.BytesIO()))


def joined(pieces):
    """Return the documents that the pieces form."""
    found = []
    for piece in pieces:
        if piece.starts_document:
            found.append("")
        found[-1] += piece.text
    return found


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE_SIZE", 8)


# .txt and stdin


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b" \n\t\n", []),
        (b"one\n\ntwo\n", ["one\n\ntwo\n"]),
        (b"no end of line", ["no end of line"]),
        (b"\xef\xbb\xbfmarked", ["marked"]),
        (b"a\xef\xbb\xbfb", ["a\ufeffb"]),
        (b"a\r\nb\rc\n", ["a\r\nb\rc\n"]),
        (b"a\n<|endoftext|>\nb\n<|endoftext|>\n", ["a\n", "b\n"]),
        (b"a\r\n<|endoftext|>\r\nb", ["a\r\n", "b"]),
        (b"<|endoftext|>\n\n<|endoftext|>\n<|endoftext|>", []),
        (b"\xef\xbb\xbf<|endoftext|>\na", ["a"]),
        (b"a <|endoftext|>\n<|endoftext|> b\n", ["a <|endoftext|>\n<|endoftext|> b\n"]),
        (b"a<|endoftext|>b\n<|endoftext|>\nc", ["a<|endoftext|>b\n", "c"]),
        ("é的🙂\n".encode(), ["é的🙂\n"]),
    ],
)
def test_text_files(tmp_path, content, expected):
    pieces = read(tmp_path / "x.txt", content)
    assert joined(pieces) == expected
    assert list(read_documents(["-"], io.BytesIO(content))) == pieces


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "é", "🙂", " ", "\n", "\r", "<|endoftext|>", "\n<|endoftext|>\n", "word"])))
def test_text_files_do_not_depend_on_the_block_size(parts):
    content = "".join(parts).encode()
    whole = joined(read_documents(["-"], io.BytesIO(content)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE_SIZE", 5)
        # A separator must fit into a block, so it is shortened as well.
        patch.setattr(documents, "SEPARATOR", documents.SEPARATOR[:2])
        short = "".join(parts).replace("<|endoftext|>", "<|").encode()
        pieces = list(read_documents(["-"], io.BytesIO(short)))
    assert [text.replace("<|", "<|endoftext|>") for text in joined(pieces)] == whole


@pytest.mark.parametrize("content", [b"abc\xffdef", b"abc\xc3", b"abc\xc3\n", b"\xef\xbb\xbf\xff", b"abc\xe4\xb8"])
def test_invalid_utf8_is_rejected(tmp_path, content):
    with pytest.raises(DataError, match=r"x\.txt: not UTF-8 at byte 3; convert it"):
        read(tmp_path / "x.txt", content)
    with pytest.raises(DataError, match="stdin: not UTF-8 at byte 3"):
        list(read_documents(["-"], io.BytesIO(content)))


def test_invalid_utf8_position_beyond_the_first_block(tmp_path, small_pieces):
    with pytest.raises(DataError, match="not UTF-8 at byte 1,041"):
        read(tmp_path / "x.txt", "的".encode() * 347 + b"\xe7\x9a\n")


def test_files_are_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "-"]
    assert joined(read_documents(paths, io.BytesIO(b"c"))) == ["a", "b", "c"]
    assert input_bytes(paths[:2]) == 15
    assert input_bytes(paths) is None


def test_progress_counts_bytes_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "REPORT_BYTES", 4)
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    reported = []
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    list(read_documents(paths, io.BytesIO(), reported.append))
    assert reported == [14, 28]


# .jsonl


def test_jsonl_files(tmp_path):
    content = '\ufeff{"text": "a\\nb", "more": 1}\r\n\n{"text": ""}\n  \n{"text": "\\u00e9\\ud83d\\ude42"}'.encode()
    assert read(tmp_path / "x.JSONL", content) == [Piece("a\nb", True), Piece("é🙂", True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"invalid JSON \(.*\); expected an object"),
        (b'{"text": "a"} x', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b"[]", 'expected an object with a string under "text"'),
        (b'"text"', 'expected an object with a string under "text"'),
        (b'{"Text": "a"}', 'expected an object with a string under "text"'),
        (b'{"text": 1}', 'expected an object with a string under "text"'),
        (b'{"text": "\\ud83d"}', r"found an unpaired surrogate \('\\ud83d'\)"),
        (b'{"text": "a\xff"}', "not UTF-8 at byte 25"),
    ],
)
def test_invalid_jsonl_lines_are_rejected(tmp_path, line, message):
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: {message}"):
        read(tmp_path / "x.jsonl", b'{"text": "a"}\n' + line + b"\n")


def test_overlong_jsonl_line_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 20)
    line = json.dumps({"text": "x" * ((1 << 20) - 12)}).encode()
    assert len(line) == 1 << 20
    assert len(read(tmp_path / "x.jsonl", line)) == 3
    with pytest.raises(DataError, match="line 1: longer than 1 MiB"):
        read(tmp_path / "x.jsonl", line + b" ")


# pieces


def test_long_documents_are_split(tmp_path, small_pieces):
    expected = [Piece("one two", True), Piece(" three", False), Piece(" four five", False)]
    assert read(tmp_path / "x.txt", b"one two three four five") == expected
    assert read(tmp_path / "x.jsonl", b'{"text": "one two three four five"}\n{"text": "six"}') == [
        *expected,
        Piece("six", True),
    ]


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("one two three", 7),
        ("one  two\tthr", 8),
        ("one\ntwo thr", 7),
        ("one\ntwo\nthree", 7),
        ("one\n\n\n\n\n\n\n\n", 3),
        ("  \n \n three four", 8),
        ("abcdefghijkl", 8),
    ],
)
def test_split_point(text, at):
    assert split_point(text, 0, 8) == at
    assert split_point("xyz" + text, 3, 11) == at + 3


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "I'll", "12", "é", "…", " ", "  ", "\n", "\t", "\u3000", "\u00a0", " b"])))
def test_splits_do_not_change_the_ids(parts):
    """GPT-2's pattern starts a new word at a single space, and at a line break that follows a word."""
    tokenizer = gpt2_tokenizer()
    text = "".join(parts) + "z"
    at = split_point(text, 0, len(text) - 1)
    if 0 < at < len(text) - 1:
        ids = np.concatenate([tokenizer.encode(text[:at]), tokenizer.encode(text[at:])])
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_pieces_of_the_bundled_text_have_the_same_ids(monkeypatch):
    gpt2 = gpt2_tokenizer()
    text = shakespeare_text("bundled").text[:200_000]
    monkeypatch.setattr(documents, "PIECE_SIZE", 1000)
    pieces = list(read_documents(["-"], io.BytesIO(text.encode())))
    assert len(pieces) > 150
    ids = np.concatenate([gpt2.encode(piece.text) for piece in pieces])
    np.testing.assert_array_equal(ids, gpt2.encode(text))


# input files


def test_unsupported_files_are_rejected(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    check_files([str(tmp_path / "a.txt"), "-"])
    with pytest.raises(MissingError, match=r"\.parquet files are not implemented yet"):
        check_files([str(tmp_path / "a.parquet")])
    for name, found in (("a.md", ".md"), ("a", "no file extension")):
        with pytest.raises(UsageError, match=f"found {found}, expected .txt or .jsonl"):
            check_files([str(tmp_path / name)])
    with pytest.raises(FileNotFoundError):
        check_files([str(tmp_path / "none.txt")])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_check_does_not_open_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    check_files([str(tmp_path / "pipe.txt")])
    assert input_bytes([str(tmp_path / "pipe.txt")]) is None
