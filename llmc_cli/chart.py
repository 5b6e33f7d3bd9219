"""A benchmark as a picture."""

import importlib.util
import io
from pathlib import Path

from llmc_cli.benchmarking import Benchmark
from llmc_cli.errors import MissingError, UsageError
from llmc_cli.formats.atomic import atomic_write
from llmc_cli.measuring import Row

SUFFIXES = (".svg", ".png")
INK, OURS, THEIRS = "#333333", "#2f6f9f", "#c8c8c8"
BAR_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.28, 1.1, 8.0


def require_chart(path: Path) -> None:
    """UsageError where ``path`` is no picture that can be drawn, MissingError where what draws it is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: found {path.suffix or 'no ending'}, expected .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError("--plot: matplotlib is not installed; pip install 'llmc-cli[plot]'")


def draw(benchmark: Benchmark, path: Path) -> None:
    """A bar for each row: against PyTorch how many times as fast, else the share of the ceiling."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    against = [row for row in benchmark.rows if row.torch]
    rows = against or [row for row in benchmark.rows if row.ceiling]
    figure = Figure(figsize=(WIDTH_INCHES, HEAD_INCHES + BAR_INCHES * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [row.ratios[row.best_mode] if against else row.share for row in rows]
    start = 1.0 if against else 0.0
    axes.barh(
        [row.name for row in rows],
        [value - start for value in values],
        left=start,
        color=[OURS if value >= start else THEIRS for value in values],
    )
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        axes.annotate(_label(row, value, bool(against)), (max(start, value), place), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=8, color=INK)  # fmt: skip
    axes.axvline(1.0, color=INK, linewidth=0.8, linestyle="--", zorder=0)
    if against:
        axes.set_xscale("log", base=2)  # twice as fast and half as fast are equally far from 1
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlim(min(0.5, *values) / 1.1, 2 * max(2.0, *values) ** 2)
    else:
        axes.set_xlim(0, 1.3 * max([1.0, *values]))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.margins(y=0.01)
    axes.invert_yaxis()  # the first row on top
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel(
        "times as fast as PyTorch in its best mode" if against else "share of the ceiling that bounds it", fontsize=9
    )
    settings, machine = benchmark.settings, benchmark.machine
    axes.set_title(
        f"llmc {settings['model']} {settings['precision']}, {settings['threads']} threads, {machine['processor']}",
        fontsize=10, loc="left",
    )  # fmt: skip
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower()[1:], dpi=150)
    with atomic_write(path) as file:
        file.write(picture.getvalue())


def _label(row: Row, value: float, against: bool) -> str:
    if not against:
        return f"{value:.0%} {row.ceiling}"
    return f"{value:.2f}x ({1000 * row.seconds:.4g} ms, {row.best_mode} {1000 * row.torch[row.best_mode]:.4g} ms)"
