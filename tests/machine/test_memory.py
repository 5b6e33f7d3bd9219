from llmc_cli.machine.memory import peak_memory


def test_peak_memory_is_plausible():
    peak = peak_memory()
    assert peak is None or 10e6 < peak < 1e12
