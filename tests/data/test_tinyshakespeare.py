import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc_cli.data import tinyshakespeare
from llmc_cli.data.documents import Piece
from llmc_cli.data.tinyshakespeare import ShakespeareText, shakespeare_sections, shakespeare_text
from llmc_cli.errors import DataError, MissingError

BUNDLED_SHA256 = "e34b9045f3c754f7fee341660f4ed59ec793a54bd82e76d2fa8e9849c55bd7ff"


def test_sections_end_with_an_empty_line():
    assert list(shakespeare_sections("a\n\nb\n\n\nc\n")) == [
        Piece("a\n\n", True),
        Piece("b\n\n", True),
        Piece("\nc\n", True),
    ]
    assert list(shakespeare_sections("a\n\n")) == [Piece("a\n\n", True), Piece("", True)]


@settings(deadline=None)
@given(st.text("ab\n"))
def test_sections_contain_all_text(text):
    assert "".join(piece.text for piece in shakespeare_sections(text)) == text


def test_bundled_text_is_exact():
    found = shakespeare_text("bundled")
    assert (found.origin, found.fallback_reason) == ("bundled", "")
    assert hashlib.sha256(found.text.encode()).hexdigest() == BUNDLED_SHA256
    assert found.text.startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me")
    for section in found.text.removesuffix("\n").split("\n\n"):
        speaker, *lines = section.split("\n")
        assert speaker.endswith(":") and lines and all(line == line.strip() != "" for line in lines)


def test_text_from_a_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes("é\r\n\n\n".encode())
    assert shakespeare_text(str(path)) == ShakespeareText("é\r\n\n\n", str(path))
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="x: not UTF-8 at byte 3"):
        shakespeare_text(str(path))
    with pytest.raises(FileNotFoundError):
        shakespeare_text(str(tmp_path / "none"))


def test_download_of_the_original(tmp_path, monkeypatch):
    calls = []

    def download(url, dest, sha256, size, *more):
        calls.append((url, dest, sha256, size))
        dest.write_bytes(b"the original")
        return dest

    monkeypatch.setattr(tinyshakespeare, "download", download)
    monkeypatch.setenv("LLMC_CACHE", str(tmp_path))
    for source in ("download", "auto"):
        assert shakespeare_text(source) == ShakespeareText("the original", "download")
    expected = (tinyshakespeare.URL, tmp_path / "tinyshakespeare.txt", tinyshakespeare.SHA256)
    assert calls == [(*expected, 1_115_394)] * 2


@pytest.mark.parametrize("error", [MissingError("no network"), DataError("no network"), OSError("no network")])
def test_auto_falls_back_to_the_bundled_text(error, monkeypatch):
    def download(*arguments):
        raise error

    monkeypatch.setattr(tinyshakespeare, "download", download)
    found = shakespeare_text("auto")
    assert (found.origin, found.fallback_reason) == ("bundled", "no network")
    assert found.text == shakespeare_text("bundled").text
    with pytest.raises(type(error)):
        shakespeare_text("download")
