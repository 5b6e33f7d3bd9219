"""Replacing model folders."""

from pathlib import Path

import pytest
from support.converting import BF16, MODEL, convert

from llmc_cli.conversion import writers


def test_failed_write_leaves_the_old_folder_unchanged(tmp_path, monkeypatch):
    dest = tmp_path / "folder"
    convert(MODEL, dest)
    (dest / "vocab.json").write_text("{}")
    before = (dest / "model.safetensors").read_bytes()

    def fail(path, tensors, dtype):
        path.parent.mkdir()
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(writers, "write_safetensors", fail)
        convert(BF16, dest)
    assert (dest / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    convert(BF16, dest)
    assert (dest / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in dest.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_interrupted_rename_restores_the_old_folder(tmp_path, monkeypatch):
    dest = tmp_path / "folder"
    convert(MODEL, dest)
    before = (dest / "model.safetensors").read_bytes()
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        convert(BF16, dest)
    assert (dest / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
