from support.benchmark_inputs import make_job

from llmc_cli.benchmark.job import Job


def test_json_round_trip():
    assert Job.from_json(make_job("train").to_json()) == make_job("train")
