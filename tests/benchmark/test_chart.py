import pytest
from support.benchmark_inputs import make_benchmark, make_row

from llmc_cli.benchmark.chart import draw, require_chart
from llmc_cli.errors import MissingError, UsageError


@pytest.mark.parametrize(("name", "start"), [("c.svg", b"<?xml"), ("c.PNG", b"\x89PNG")])
@pytest.mark.parametrize("torch", [{}, {"torch eager": 1.1, "torch compiled": 0.9}])
def test_draw_writes_an_image(tmp_path, name, start, torch):
    path = tmp_path / name
    require_chart(path)
    rows = make_row("train/step", 1.0, torch=torch), make_row("train/step/other", 0.1, ceiling="")
    draw(make_benchmark(*rows), path)
    assert path.read_bytes().startswith(start)


def test_require_chart_checks_suffix_and_matplotlib(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"expected \.svg or \.png"):
        require_chart(tmp_path / "c.gif")
    monkeypatch.setattr("llmc_cli.benchmark.chart.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'llmc-cli\[plot\]'"):
        require_chart(tmp_path / "c.svg")
