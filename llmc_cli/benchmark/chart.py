"""A benchmark as a picture."""

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING

from llmc_cli.benchmark.benchmark import Benchmark
from llmc_cli.benchmark.results import Row
from llmc_cli.errors import MissingError, UsageError
from llmc_cli.formats.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
INK, OURS, THEIRS = "#333333", "#2f6f9f", "#c8c8c8"
BAR_INCHES, HEAD_INCHES, WIDTH_INCHES = 0.28, 1.1, 8.0
AGAINST_INCHES = 5.5  # what ratios need beside the shares
LONGEST_SHARE = 1.5  # data in the caches can make it many times that
TIMES = "times as fast as PyTorch in its best mode"


def require_chart(path: Path) -> None:
    """UsageError where ``path`` is no picture that can be drawn, MissingError where what draws it is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: found {path.suffix or 'no ending'}, expected .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError("--plot: matplotlib is not installed; pip install 'llmc-cli[plot]'")


def draw(benchmark: Benchmark, path: Path) -> None:
    """A bar for each row: its share of the ceiling, and where PyTorch took part how many times as fast it is."""
    from matplotlib.figure import Figure

    against = any(row.torch for row in benchmark.rows)
    rows = [row for row in benchmark.rows if row.ceiling or row.torch]
    width = WIDTH_INCHES + AGAINST_INCHES * against
    figure = Figure(figsize=(width, HEAD_INCHES + BAR_INCHES * len(rows)), layout="constrained")
    shares, *ratios = figure.subplots(1, 1 + against, sharey=True, squeeze=False)[0]
    _shares(shares, rows)
    for axes in ratios:
        _ratios(axes, rows)
    for axes in (shares, *ratios):
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle="--", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    shares.set_yticks(range(len(rows)), [row.name for row in rows])
    shares.margins(y=0.01)
    shares.invert_yaxis()  # the first row on top
    settings, machine = benchmark.settings, benchmark.machine
    on = machine.get("card") or f"{_threads(settings['threads'])}, {machine['processor']}"
    title = f"llmc {settings['model']} {settings['precision']}, {on}"
    others = ", ".join(f"{section} {theirs}" for section, (_, theirs) in benchmark.other_precisions.items())
    figure.suptitle(title + (f"; PyTorch: {others}" if others else ""), fontsize=10, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower()[1:], dpi=150)
    with atomic_write(path) as file:
        file.write(picture.getvalue())


def _shares(axes: "Axes", rows: list[Row]) -> None:
    """Each row's share of its ceiling, which is named; what is far above it is cut off."""
    from matplotlib.ticker import PercentFormatter

    lengths = [min(row.share, LONGEST_SHARE) for row in rows]
    axes.barh(range(len(rows)), lengths, color=OURS)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        share = f"{row.share:.0%} {row.ceiling}, " if row.ceiling else ""
        _annotate(axes, length, place, share + _milliseconds(row.seconds))
    axes.set_xlim(0, 1.6 * max([1.0, *lengths]))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the ceiling that bounds it", fontsize=9)


def _ratios(axes: "Axes", rows: list[Row]) -> None:
    """How many times as fast each row is as PyTorch; slower ones to the left of 1, in grey."""
    values = {place: row.ratios[row.best_mode] for place, row in enumerate(rows) if row.torch}
    axes.barh(
        list(values),
        [value - 1.0 for value in values.values()],
        left=1.0,
        color=[OURS if value >= 1.0 else THEIRS for value in values.values()],
    )
    for place, value in values.items():
        mode = rows[place].best_mode
        text = f"{value:.2f}x, {mode.removeprefix('torch ')} {_milliseconds(rows[place].torch[mode])}"
        _annotate(axes, max(1.0, value), place, text)
    axes.set_xscale("log", base=2)  # twice as fast and half as fast are equally far from 1
    axes.xaxis.set_major_formatter("{x:g}")
    lowest, highest = min(0.5, *values.values()) / 1.1, max(2.0, *values.values())
    axes.set_xlim(lowest, highest * (highest / lowest) ** 0.7)  # room for the text
    axes.set_xlabel(TIMES, fontsize=9)


def _annotate(axes: "Axes", x: float, y: int, text: str) -> None:
    """Text to the right of a bar's end, readable across the line at 1."""
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.annotate(
        text, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, color=INK, bbox=ground
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
