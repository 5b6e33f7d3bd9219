import dataclasses

from support.benchmark_inputs import CEILINGS, make_row

from llmc_cli.benchmark.results import model_flops_utilization, share_of_ceiling


def test_share_is_of_the_limiting_ceiling():
    assert share_of_ceiling(50e9, 1e9, CEILINGS) == (0.5, "matmul")
    assert share_of_ceiling(5e9, 8e9, CEILINGS) == (0.8, "memory")


def test_mfu_uses_the_published_peak_if_given():
    assert model_flops_utilization(50e9, CEILINGS) == (0.5, "MFU")
    published = dataclasses.replace(CEILINGS, published=2e12)
    assert model_flops_utilization(50e9, published) == (0.025, "MFU of 2 TFLOP/s")


def test_row_ratios_and_best_mode():
    row = make_row("train/step", 2.0, torch={"torch eager": 3.0, "torch compiled": 1.0})
    assert row.ratios == {"torch eager": 1.5, "torch compiled": 0.5}
    assert row.best_mode == "torch compiled"
