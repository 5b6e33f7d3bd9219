"""What a person or a program sees: results on stdout, everything else on stderr."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
LINE_EVERY_S = 10.0  # how often progress is told where there is no terminal to draw a bar on


def finite(value: Any) -> Any:
    """``value`` with every number that is not finite replaced by None, which JSON can say."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def seconds(value: float) -> str:
    """A duration for people: ``8.3 s``, ``4 min 10 s``, ``3 h 20 min``."""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{int(value) // 60} min {int(value) % 60} s"
    return f"{int(value) // 3600} h {int(value) % 3600 // 60} min"


def size(value: float) -> str:
    """Bytes for people, in powers of ten as disks and memory are sold: ``497.9 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


@dataclass(frozen=True)
class Output:
    """Where a command's words go. ``json``: stdout is for a program; ``quiet``: stderr is for errors only."""

    json: bool = False
    quiet: bool = False

    def line(self, text: str) -> None:
        """A line of the result, at once, also into a pipe."""
        print(text, flush=True)

    def text(self, part: str) -> None:
        """A part of a result that is text, at once and as it is: UTF-8, no newline added or translated."""
        sys.stdout.flush()
        sys.stdout.buffer.write(part.encode())
        sys.stdout.buffer.flush()

    def document(self, content: dict[str, Any]) -> None:
        """The result as JSON on one line: the whole of it, or one event of a stream."""
        print(json.dumps({"schema": SCHEMA, **finite(content)}, allow_nan=False), flush=True)

    def note(self, text: str) -> None:
        """Something that accompanies the result."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"llmc: warning: {text}")

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "", result: bool = True
    ) -> None:
        """A table on stdout (``result``) or stderr: drawn on a terminal, tab-separated lines in a pipe.

        Columns whose cells all start like numbers are set flush right.
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
            short = max(map(len, [column, *cells])) <= console.width // 3  # long ones share what the others leave
            table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=short)
        for row in rows:
            table.add_row(*row)
        console.print(table)

    @contextlib.contextmanager
    def progress(
        self, what: str, total: float | None, unit: Callable[[float], str] = str, terminal_only: bool = False
    ) -> Iterator[Callable[[float], None]]:
        """Yields a function that takes the amount done so far, of ``total`` (None: unknown), told through ``unit``:
        a bar on a terminal, elsewhere a line now and then, or nothing with ``terminal_only``."""
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
                redirect_stdout=sys.stdout.isatty(),  # results go above the bar, but never from a file to the terminal
            ) as bar:
                task = bar.add_task(what, total=total, amount="")
                yield lambda done: bar.update(task, completed=done, amount=unit(done))
        else:
            last = time.monotonic()

            def tell(done: float) -> None:
                nonlocal last
                if time.monotonic() - last >= LINE_EVERY_S:
                    last = time.monotonic()
                    self.note(f"{what}: {unit(done)}" + (f" of {unit(total)}" if total else ""))

            yield tell
