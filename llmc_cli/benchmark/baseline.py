"""Comparison of a benchmark with a saved one."""

import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc_cli.benchmark.results import Row
from llmc_cli.errors import DataError, UsageError
from llmc_cli.machine.cores import available_cores, processor_name

SCHEMA = 1
STDIN = Path("-")


@dataclass(frozen=True)
class Change:
    """The seconds of a row in the baseline (``before``) and in this benchmark (``now``)."""

    name: str
    before: float
    now: float

    @property
    def slowdown(self) -> float:
        """Relative increase in time; negative if the row is faster now."""
        return self.now / self.before - 1


@dataclass(frozen=True)
class Baseline:
    """A saved benchmark. ``name``: of its file; ``seconds``: by row name."""

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, float]

    def check(self, machine: dict[str, Any], settings: dict[str, Any]) -> None:
        """Raise UsageError if the baseline is from another machine or has other settings."""
        differences = _differences(self.machine, machine) + _differences(self.settings, settings)
        shared = self.settings["sections"].keys() & settings["sections"].keys()
        for section in sorted(shared):
            found = _differences(self.settings["sections"][section], settings["sections"][section])
            differences += [f"{section}: {difference}" for difference in found]
        if not shared:
            differences.append("it contains none of the requested sections")
        if differences:
            raise UsageError(
                f"{self.name}: not comparable: {'; '.join(differences)}; record a new baseline with --save"
            )

    def changes(self, rows: list[Row]) -> list[Change]:
        """Compare the rows present in both. The operations of a training step are excluded: they have too few runs."""
        return [
            Change(row.name, self.seconds[row.name], row.seconds)
            for row in rows
            if row.name in self.seconds and row.name.count("/") < 2
        ]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the settings that differ. Models are compared by configuration, not by name."""
    differences = []
    for key in now.keys() - {"model", "sections"}:
        if before.get(key) != now[key]:
            name = "model" if key == "config" else key
            differences.append(f"{name} was {before.get(name)}, is {now[name]}")
    return sorted(differences)


def file_name(path: Path) -> str:
    """Return the name of a baseline file for messages."""
    return "stdin" if path == STDIN else str(path)


def read_baseline(path: Path) -> Baseline:
    """Read a file written by ``Benchmark.save``; "-" is stdin. Raise DataError if it is not a saved benchmark."""
    file = file_name(path)
    try:
        content = json.loads(sys.stdin.buffer.read() if path == STDIN else path.read_bytes())
        if content["schema"] != SCHEMA:
            raise DataError(f"{file}: found schema {content['schema']}, expected {SCHEMA}; record it again with --save")
        seconds = {str(row["name"]): float(row["seconds"]) for row in content["rows"]}
        machine, settings = dict(content["machine"]), dict(content["settings"])
        dict(settings["sections"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: not a saved benchmark ({type(error).__name__}: {error}); expected a file written by --save"
        ) from None
    return Baseline(file, machine, settings, seconds)


def this_machine() -> dict[str, Any]:
    """Return the properties of this machine that must match for times to be comparable."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor_name(),
        "cores": available_cores(),
    }
