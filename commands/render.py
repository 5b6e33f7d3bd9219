"""Output of the commands: results on stdout; progress, messages and warnings on stderr."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
PROGRESS_INTERVAL_S = 10.0  # between progress lines where stderr is not a terminal


def nonfinite_to_none(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity replaced by None, because JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: nonfinite_to_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nonfinite_to_none(item) for item in value]
    return value


def format_duration(seconds: float) -> str:
    """Format a duration: ``8.3 s``, ``4 min 10 s``, ``3 h 20 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"


def format_size(size: float) -> str:
    """Format a number of bytes with decimal units: ``497.9 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


@dataclass(frozen=True)
class Output:
    """The output streams of a command. ``json``: stdout is JSON; ``quiet``: stderr shows errors only."""

    json: bool = False
    quiet: bool = False

    def print_line(self, text: str) -> None:
        """Print one line of the result and flush it."""
        print(text, flush=True)

    def write(self, text: str) -> None:
        """Write part of a text result as UTF-8 and flush it. Newlines are neither added nor translated."""
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()

    def print_json(self, content: dict[str, Any]) -> None:
        """Print a JSON object on one line: the whole result, or one event of a JSON Lines stream."""
        print(json.dumps({"schema": SCHEMA, **nonfinite_to_none(content)}, allow_nan=False), flush=True)

    def info(self, text: str) -> None:
        """Print a message to stderr, unless ``quiet``."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        """Print a warning to stderr, unless ``quiet``."""
        self.info(f"llmc: warning: {text}")

    def print_table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", result: bool = True
    ) -> None:
        """Print a table to stdout (``result``) or stderr: formatted on a terminal, tab-separated otherwise.

        Columns are right-aligned if every cell starts like a number. ``title`` is shown on a terminal only.
        """
        stream = sys.stdout if result else sys.stderr
        if not result and self.quiet:
            return
        if not stream.isatty():
            for row in (columns, *rows):
                print("\t".join(row), file=stream, flush=True)
            return
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console = Console(file=stream)
        table = Table(title=title or None, title_justify="left", header_style="bold", box=box.SIMPLE, pad_edge=False)
        for index, column in enumerate(columns):
            cells = [row[index] for row in rows]
            numeric = all(cell[:1] in "0123456789-+." for cell in cells if cell)
            no_wrap = max(map(len, [column, *cells])) <= console.width // 3  # only wide columns may wrap
            table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=no_wrap)
        for row in rows:
            table.add_row(*row)
        console.print(table)

    @contextlib.contextmanager
    def progress(
        self,
        description: str,
        total: float | None,
        format_amount: Callable[[float], str] = str,
        terminal_only: bool = False,
    ) -> Iterator[Callable[[float], None]]:
        """Yield a function that updates the progress to the given amount of ``total`` (None: unknown).

        Progress is a bar on a terminal and a line every 10 seconds elsewhere, or nothing with ``terminal_only``.
        """
        if self.quiet or (terminal_only and not sys.stderr.isatty()):
            yield lambda done: None
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}")
            with Progress(
                *columns,
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # print results above the bar; leave a redirected stdout alone
            ) as bar:
                task = bar.add_task(description, total=total, amount="")
                yield lambda done: bar.update(task, completed=done, amount=format_amount(done))
        else:
            last = time.monotonic()

            def update(done: float) -> None:
                nonlocal last
                if time.monotonic() - last >= PROGRESS_INTERVAL_S:
                    last = time.monotonic()
                    of_total = f" of {format_amount(total)}" if total else ""
                    self.info(f"{description}: {format_amount(done)}{of_total}")

            yield update
