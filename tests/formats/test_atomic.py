"""Atomic file writes."""

import errno
import os
import stat

import pytest

from llmc_cli.formats.atomic import atomic_write


def test_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "file.bin"
    with atomic_write(path) as file:
        file.write(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


def test_exception_leaves_the_old_file_unchanged(tmp_path):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.bin"]


def test_file_has_the_permissions_of_open(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_write(tmp_path / "atomic"):
        pass
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folder_is_not_replaced(tmp_path):
    with pytest.raises(FileExistsError, match="not a regular file"), atomic_write(tmp_path):
        pass


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_special_file_is_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(FileExistsError, match="not a regular file"), atomic_write(path) as file:
        file.write(b"abc")
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_disk_full_error_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(tmp_path / "file.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file.bin")


def test_folder_flush_error_is_ignored(tmp_path, monkeypatch):
    flush = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    with atomic_write(tmp_path / "file.bin") as file:
        file.write(b"abc")
    assert (tmp_path / "file.bin").read_bytes() == b"abc"
