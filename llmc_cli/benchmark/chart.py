"""Bar chart of a benchmark."""

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
TEXT_COLOR, LLMC_COLOR, SLOWER_COLOR = "#333333", "#2f6f9f", "#c8c8c8"
BAR_INCHES, MARGIN_INCHES, WIDTH_INCHES = 0.28, 1.1, 8.0
RATIO_INCHES = 5.5  # additional width for the ratios to PyTorch
MAX_SHARE = 1.5  # longer bars are cut off; cached data can give many times this


def require_chart(path: Path) -> None:
    """Raise UsageError for an unsupported file type, and MissingError if matplotlib is not installed."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"--plot {path}: found {path.suffix or 'no suffix'}, expected .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError("--plot: matplotlib is not installed; run pip install 'llmc-cli[plot]'")


def draw(benchmark: Benchmark, path: Path) -> None:
    """Draw a bar per row: its share of the ceiling, and if measured its speed relative to PyTorch."""
    from matplotlib.figure import Figure

    has_ratios = any(row.torch for row in benchmark.rows)
    rows = [row for row in benchmark.rows if row.ceiling or row.torch]
    width = WIDTH_INCHES + RATIO_INCHES * has_ratios
    figure = Figure(figsize=(width, MARGIN_INCHES + BAR_INCHES * len(rows)), layout="constrained")
    shares, *ratios = figure.subplots(1, 1 + has_ratios, sharey=True, squeeze=False)[0]
    _shares(shares, rows)
    for axes in ratios:
        _ratios(axes, rows)
    for axes in (shares, *ratios):
        axes.axvline(1.0, color=TEXT_COLOR, linewidth=0.8, linestyle="--", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    shares.set_yticks(range(len(rows)), [row.name for row in rows])
    shares.margins(y=0.01)
    shares.invert_yaxis()  # first row on top
    settings, machine = benchmark.settings, benchmark.machine
    hardware = machine.get("card") or f"{_threads(settings['threads'])}, {machine['processor']}"
    title = f"llmc {settings['model']} {settings['precision']}, {hardware}"
    others = ", ".join(f"{section} {torch}" for section, (_, torch) in benchmark.precision_differences.items())
    figure.suptitle(title + (f"; PyTorch: {others}" if others else ""), fontsize=10, x=0.01, ha="left")
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.lower()[1:], dpi=150)
    with atomic_write(path) as file:
        file.write(image.getvalue())


def _shares(axes: "Axes", rows: list[Row]) -> None:
    """Draw each row's share of its ceiling, cut off at ``MAX_SHARE``."""
    from matplotlib.ticker import PercentFormatter

    lengths = [min(row.share, MAX_SHARE) for row in rows]
    axes.barh(range(len(rows)), lengths, color=LLMC_COLOR)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        share = f"{row.share:.0%} {row.ceiling}, " if row.ceiling else ""
        _annotate(axes, length, index, share + _milliseconds(row.seconds))
    axes.set_xlim(0, 1.6 * max([1.0, *lengths]))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of the limiting ceiling", fontsize=9)


def _ratios(axes: "Axes", rows: list[Row]) -> None:
    """Draw each row's speed relative to PyTorch's fastest mode; slower rows are gray."""
    values = {index: row.ratios[row.best_mode] for index, row in enumerate(rows) if row.torch}
    axes.barh(
        list(values),
        [value - 1.0 for value in values.values()],
        left=1.0,
        color=[LLMC_COLOR if value >= 1.0 else SLOWER_COLOR for value in values.values()],
    )
    for index, value in values.items():
        mode = rows[index].best_mode
        text = f"{value:.2f}x, {mode.removeprefix('torch ')} {_milliseconds(rows[index].torch[mode])}"
        _annotate(axes, max(1.0, value), index, text)
    axes.set_xscale("log", base=2)  # 2x and 0.5x are equally far from 1
    axes.xaxis.set_major_formatter("{x:g}")
    lowest, highest = min(0.5, *values.values()) / 1.1, max(2.0, *values.values())
    axes.set_xlim(lowest, highest * (highest / lowest) ** 0.7)  # room for the text
    axes.set_xlabel("speed relative to PyTorch's fastest mode", fontsize=9)


def _annotate(axes: "Axes", x: float, y: int, text: str) -> None:
    """Write text to the right of a bar, on a white background so that the line at 1 does not cross it."""
    background = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.annotate(
        text,
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=TEXT_COLOR,
        bbox=background,
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
