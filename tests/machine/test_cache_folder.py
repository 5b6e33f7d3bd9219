from pathlib import Path

import pytest

from llmc_cli.machine.cache_folder import cache_folder


def test_environment_variables_set_the_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("LLMC_CACHE", "/c")
    assert cache_folder() == Path("/c")
    monkeypatch.delenv("LLMC_CACHE")
    assert cache_folder() == Path("/x/llmc")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "llmc"

    def fail():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(FileNotFoundError, match="LLMC_CACHE"):
        cache_folder()
