import os

import pytest
from support.benchmark_inputs import ignore, make_job

from llmc_cli.benchmark import startup
from llmc_cli.errors import MissingError


def test_cold_runs_use_a_new_empty_cache(monkeypatch, tiny_config):
    environments = []

    def time_first_step(job, model, shard, environment):
        environments.append(environment)
        return 30.0 if environment["LLMC_CACHE"] != "warm cache" else 2.0

    monkeypatch.setenv("LLMC_CACHE", "warm cache")
    monkeypatch.setattr(startup, "time_first_step", time_first_step)
    result = startup.measure_startup(make_job("start"), str(tiny_config), ignore)
    assert {row.name: row.seconds for row in result.rows} == {
        "start/warm": 2.0,
        "start/cold": 30.0,
        "start/cold/compile": 28.0,
    }
    assert len({each["LLMC_CACHE"] for each in environments}) == 3  # an empty one for each cold run


@pytest.mark.usefixtures("backend")
def test_first_step_is_timed_in_a_new_process(tiny_config, tiny_data):
    shard = tiny_data / "tiny_train_0.bin"
    assert 0 < startup.time_first_step(make_job("start"), str(tiny_config), shard, dict(os.environ)) < 60
    with pytest.raises(MissingError, match=r"llmc train ended with status 3: .*missing\.bin"):
        startup.time_first_step(make_job("start"), str(tiny_config), tiny_data / "missing.bin", dict(os.environ))
