import hashlib
import io
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc_cli.data import documents, tinyshakespeare
from llmc_cli.data.documents import Piece, check_files, cut_before, input_bytes, read_documents
from llmc_cli.data.tinyshakespeare import shakespeare_sections, shakespeare_text
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.tokenizer.tokenizer import load_tokenizer

BUNDLED_SHA256 = "e34b9045f3c754f7fee341660f4ed59ec793a54bd82e76d2fa8e9849c55bd7ff"


@pytest.fixture(scope="module")
def gpt2():
    return load_tokenizer("gpt2")


def read(path, content):
    path.write_bytes(content)
    return list(read_documents([str(path)], io.BytesIO()))


def joined(pieces):
    """The documents that pieces make."""
    found = []
    for piece in pieces:
        if piece.starts:
            found.append("")
        found[-1] += piece.text
    return found


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 8)


# Tiny Shakespeare


def test_sections():
    assert list(shakespeare_sections("a\n\nb\n\n\nc\n")) == [
        Piece("a\n\n", True),
        Piece("b\n\n", True),
        Piece("\nc\n", True),
    ]
    assert list(shakespeare_sections("a\n\n")) == [Piece("a\n\n", True), Piece("", True)]


@settings(deadline=None)
@given(st.text("ab\n"))
def test_sections_lose_nothing(text):
    assert "".join(piece.text for piece in shakespeare_sections(text)) == text


def test_the_bundled_text():
    found = shakespeare_text("bundled")
    assert (found.origin, found.shortfall) == ("bundled", "")
    assert hashlib.sha256(found.text.encode()).hexdigest() == BUNDLED_SHA256
    assert found.text.startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me")
    for section in found.text.removesuffix("\n").split("\n\n"):
        speaker, *lines = section.split("\n")
        assert speaker.endswith(":") and lines and all(line == line.strip() != "" for line in lines)


def test_a_text_of_ones_own(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("é\r\n\n\n".encode())
    assert shakespeare_text(str(path)) == tinyshakespeare.ShakespeareText("é\r\n\n\n", str(path))
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="x: not UTF-8 at byte 3"):
        shakespeare_text(str(path))
    with pytest.raises(FileNotFoundError):
        shakespeare_text(str(tmp_path / "none"))


def test_the_original_by_download(tmp_path, monkeypatch):
    asked = []

    def download(url, dest, sha256, size, *more):
        asked.append((url, dest, sha256, size))
        dest.write_bytes(b"the original")
        return dest

    monkeypatch.setattr(tinyshakespeare, "download", download)
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    for source in ("download", "auto"):
        assert shakespeare_text(source) == tinyshakespeare.ShakespeareText("the original", "download")
    expected = (
        tinyshakespeare.TINY_SHAKESPEARE_URL,
        tmp_path / "tinyshakespeare.txt",
        tinyshakespeare.TINY_SHAKESPEARE_SHA256,
    )
    assert asked == [(*expected, 1_115_394)] * 2


@pytest.mark.parametrize("error", [MissingError("no network"), DataError("no network"), OSError("no network")])
def test_where_the_original_cannot_be_had(error, monkeypatch):
    def download(*arguments):
        raise error

    monkeypatch.setattr(tinyshakespeare, "download", download)
    found = shakespeare_text("auto")
    assert (found.origin, found.shortfall) == ("bundled", "no network")
    assert found.text == shakespeare_text("bundled").text
    with pytest.raises(type(error)):
        shakespeare_text("download")


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
def test_plain_text(tmp_path, content, expected):
    pieces = read(tmp_path / "x.txt", content)
    assert joined(pieces) == expected
    assert list(read_documents(["-"], io.BytesIO(content))) == pieces


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "é", "🙂", " ", "\n", "\r", "<|endoftext|>", "\n<|endoftext|>\n", "word"])))
def test_plain_text_does_not_depend_on_the_blocks_it_is_read_in(parts):
    content = "".join(parts).encode()
    whole = joined(read_documents(["-"], io.BytesIO(content)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 5)
        # A separator must fit into a block, which it always does: here it is shortened, as the blocks are.
        patch.setattr(documents, "SEPARATOR", documents.SEPARATOR[:2])
        short = "".join(parts).replace("<|endoftext|>", "<|").encode()
        pieces = list(read_documents(["-"], io.BytesIO(short)))
    assert [text.replace("<|", "<|endoftext|>") for text in joined(pieces)] == whole


@pytest.mark.parametrize("content", [b"abc\xffdef", b"abc\xc3", b"abc\xc3\n", b"\xef\xbb\xbf\xff", b"abc\xe4\xb8"])
def test_not_utf8(tmp_path, content):
    with pytest.raises(DataError, match=r"x\.txt: not UTF-8 at byte 3; convert it"):
        read(tmp_path / "x.txt", content)
    with pytest.raises(DataError, match="stdin: not UTF-8 at byte 3"):
        list(read_documents(["-"], io.BytesIO(content)))


def test_not_utf8_far_behind(tmp_path, small_pieces):
    with pytest.raises(DataError, match="not UTF-8 at byte 1,041"):
        read(tmp_path / "x.txt", "的".encode() * 347 + b"\xe7\x9a\n")


def test_several_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "-"]
    assert joined(read_documents(paths, io.BytesIO(b"c"))) == ["a", "b", "c"]
    assert input_bytes(paths[:2]) == 15
    assert input_bytes(paths) is None


def test_progress_is_the_bytes_of_all_files(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "REPORT_EVERY", 4)
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    told = []
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    list(read_documents(paths, io.BytesIO(), told.append))
    assert told == [14, 28]


# .jsonl


def test_json_lines(tmp_path):
    content = '\ufeff{"text": "a\\nb", "more": 1}\r\n\n{"text": ""}\n  \n{"text": "\\u00e9\\ud83d\\ude42"}'.encode()
    assert read(tmp_path / "x.JSONL", content) == [Piece("a\nb", True), Piece("é🙂", True)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"found no JSON \(.*\), expected an object"),
        (b'{"text": "a"} x', "found no JSON"),
        (b"[" * 100_000, "found no JSON"),
        (b"[]", 'found no string under "text"'),
        (b'"text"', 'found no string under "text"'),
        (b'{"Text": "a"}', 'found no string under "text"'),
        (b'{"text": 1}', 'found no string under "text"'),
        (b'{"text": "\\ud83d"}', r"found half a surrogate pair \('\\ud83d'\)"),
        (b'{"text": "a\xff"}', "not UTF-8 at byte 25"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: {message}"):
        read(tmp_path / "x.jsonl", b'{"text": "a"}\n' + line + b"\n")


def test_a_line_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LINE_LIMIT", 1 << 20)
    line = json.dumps({"text": "x" * ((1 << 20) - 12)}).encode()
    assert len(line) == 1 << 20
    assert len(read(tmp_path / "x.jsonl", line)) == 3
    with pytest.raises(DataError, match="line 1: found more than 1 MiB"):
        read(tmp_path / "x.jsonl", line + b" ")


# pieces


def test_long_documents_are_cut(tmp_path, small_pieces):
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
def test_where_to_cut(text, at):
    assert cut_before(text, 0, 8) == at
    assert cut_before("xyz" + text, 3, 11) == at + 3


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "I'll", "12", "é", "…", " ", "  ", "\n", "\t", "\u3000", "\u00a0", " b"])))
def test_cuts_do_not_change_the_ids(parts):
    """At a single space, or a line break that follows a word, GPT-2 begins a new word anyway."""
    tokenizer = load_once()
    text = "".join(parts) + "z"
    at = cut_before(text, 0, len(text) - 1)
    if 0 < at < len(text) - 1:
        ids = np.concatenate([tokenizer.encode(text[:at]), tokenizer.encode(text[at:])])
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def load_once(loaded=[]):  # noqa: B006 (hypothesis cannot take the fixture)
    if not loaded:
        loaded.append(load_tokenizer("gpt2"))
    return loaded[0]


def test_the_bundled_text_in_pieces_has_the_same_ids(gpt2, monkeypatch):
    text = shakespeare_text("bundled").text[:200_000]
    monkeypatch.setattr(documents, "PIECE", 1000)
    pieces = list(read_documents(["-"], io.BytesIO(text.encode())))
    assert len(pieces) > 150
    ids = np.concatenate([gpt2.encode(piece.text) for piece in pieces])
    np.testing.assert_array_equal(ids, gpt2.encode(text))


# which files


def test_files_that_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    check_files([str(tmp_path / "a.txt"), "-"])
    with pytest.raises(MissingError, match=r"\.parquet files: not yet"):
        check_files([str(tmp_path / "a.parquet")])
    for name, found in (("a.md", ".md"), ("a", "no ending")):
        with pytest.raises(UsageError, match=f"found {found}, expected .txt or .jsonl"):
            check_files([str(tmp_path / name)])
    with pytest.raises(FileNotFoundError):
        check_files([str(tmp_path / "none.txt")])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_named_pipe_is_not_opened_to_check_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    check_files([str(tmp_path / "pipe.txt")])
    assert input_bytes([str(tmp_path / "pipe.txt")]) is None
