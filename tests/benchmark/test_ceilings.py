from llmc_cli.benchmark.ceilings import memory_bandwidth


def test_memory_bandwidth_measures_three_kinds_of_traffic(backend):
    bandwidth = memory_bandwidth(backend.kernels, 2, 1 << 10)
    assert list(bandwidth) == ["read", "copy", "update"]
    assert min(bandwidth.values()) > 0
