"""Conflicting options and invalid destinations of a conversion."""

import os
import shutil
from pathlib import Path

import pytest
from support.converting import MODEL, convert
from support.paths import TINY_GPT2

from llmc_cli.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 5, "dtype": "fp32"}, "version 5 is bf16"),
        ({"version": 3, "dtype": "bf16"}, "version 3 is fp32"),
        ({"version": 2}, "cannot be written"),
        ({"version": 4, "dtype": "bf16"}, "cannot be written"),
        ({"batch": 4}, "--batch"),
        ({"seq_len": 8}, "--seq-len"),
        ({"data": Path("x.bin")}, "--data"),
        ({"reference": "numpy"}, "--reference"),
    ],
)
def test_conflicting_options_are_rejected(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        convert(MODEL, tmp_path / "tiny.bin", **options)


def test_invalid_destinations_are_rejected(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy.bin"
    shutil.copy(MODEL, copy)
    (tmp_path / "plain").write_text("x")
    (tmp_path / "taken.bin").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    cases = [
        (copy, None, {}, "give a DEST"),
        (copy, None, {"dtype": "bf16"}, "give a DEST"),
        (copy, copy, {}, "overwrite an input"),
        (copy, Path("copy.bin"), {}, "overwrite an input"),
        (tiny_folder, tiny_folder, {}, "overwrite an input"),
        (TINY_GPT2 / "pytorch", TINY_GPT2 / "pytorch" / "pytorch_model.bin", {}, "overwrite an input"),
        (copy, Path("new.bin"), {"tokenizer": tmp_path / "new.bin"}, "two outputs"),
        (copy, Path("new.gguf"), {}, r"\.bin"),
        (copy, Path("plain"), {}, r"\.bin"),
        (copy, Path(), {}, "name of a folder"),
        (copy, Path(".."), {}, "name of a folder"),
        (copy, Path("taken.bin"), {}, "folder"),
        (copy, Path("full"), {}, r"thesis\.tex"),
        (copy, Path("new"), {"version": 3}, "--version"),
        (copy, Path("-"), {}, "does not read stdin"),
        ("-", Path("new.bin"), {}, "does not read stdin"),
    ]
    for source, dest, options, message in cases:
        with pytest.raises(UsageError, match=message):
            convert(source, dest, **options)
    assert copy.read_bytes() == MODEL.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.bin", "full", "plain", "source", "taken.bin"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_pipe_is_rejected_as_destination(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"\.bin"):
        convert(MODEL, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
