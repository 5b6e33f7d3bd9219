"""The two logs of a run: ``main.log`` in llm.c's format, and ``metrics.jsonl``."""

import json
import re
from pathlib import Path
from typing import Any

from llmc_cli.formats.atomic import atomic_write

SCHEMA = 1


class RunLog:
    """Appends events to the logs in ``folder``; does nothing if it is None.

    With ``start_at`` None the logs are cleared. With a step N they are truncated to the updates 0 … N-1 and the
    validations of earlier steps.
    """

    def __init__(self, folder: Path | None, start_at: int | None) -> None:
        self.main = folder / "main.log" if folder else None
        self.metrics = folder / "metrics.jsonl" if folder else None
        if self.main and self.metrics:
            _truncate(self.main, start_at, _step_of_main)
            _truncate(self.metrics, start_at, _step_of_metrics)

    def update(self, step: int, loss: float, norm: float, lr: float, metrics: dict[str, Any]) -> None:
        """Log the update from ``step`` to step + 1."""
        self._append(f"s:{step} trl:{loss:.4f} lr:{lr:.6f} norm:{norm:.2f}", metrics)

    def validation(self, step: int, loss: float, metrics: dict[str, Any]) -> None:
        self._append(f"s:{step} tel:{loss:.4f}", metrics)

    def _append(self, line: str, metrics: dict[str, Any]) -> None:
        if self.main and self.metrics:
            with self.main.open("a", encoding="utf-8", newline="\n") as file:
                file.write(line + "\n")
            with self.metrics.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps({"schema": SCHEMA, **metrics}) + "\n")


def _step_of_main(line: str) -> int:
    match = re.match(r"s:(\d+) ", line)
    return int(match[1]) if match else -1


def _step_of_metrics(line: str) -> int:
    """Return the number of updates before the event; the ``step`` of an update counts from 1."""
    try:
        event = json.loads(line)
    except ValueError:  # truncated by a crash
        return -1
    return int(event["step"]) - ("loss" in event)


def _truncate(path: Path, start_at: int | None, step_of: Any) -> None:
    content = ""
    if start_at is not None and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        content = "".join(f"{line}\n" for line in lines if 0 <= step_of(line) < start_at)
    with atomic_write(path) as file:
        file.write(content.encode())
