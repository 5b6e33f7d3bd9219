import os

from llmc_cli.machine.idle_threads import PASSIVE_WAIT, set_passive_wait, user_environment


def test_user_environment_excludes_only_variables_set_here(monkeypatch):
    name, other = PASSIVE_WAIT
    monkeypatch.setattr("llmc_cli.machine.idle_threads._set_here", set())
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(other, "the user's")
    set_passive_wait()
    assert os.environ[name] == PASSIVE_WAIT[name]
    assert name not in user_environment()
    assert user_environment()[other] == "the user's"
