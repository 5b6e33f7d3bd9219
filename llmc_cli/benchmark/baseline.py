"""A benchmark that was saved, and how that of today compares with it."""

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
    """A row then and now, in seconds."""

    name: str
    before: float
    now: float

    @property
    def slowdown(self) -> float:
        """The fraction by which it takes longer now; negative where it is faster."""
        return self.now / self.before - 1


@dataclass(frozen=True)
class Baseline:
    """Of a saved benchmark what a comparison needs; ``seconds`` by row, ``name`` of the file."""

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    seconds: dict[str, float]

    def check(self, machine: dict[str, Any], settings: dict[str, Any]) -> None:
        """UsageError where the baseline was measured elsewhere or on other work than now: times would say nothing."""
        differences = _differences(self.machine, machine) + _differences(self.settings, settings)
        shared = self.settings["sections"].keys() & settings["sections"].keys()
        for section in sorted(shared):
            found = _differences(self.settings["sections"][section], settings["sections"][section])
            differences += [f"{section}: {difference}" for difference in found]
        if not shared:
            differences.append("it holds none of these sections")
        if differences:
            raise UsageError(
                f"{self.name}: cannot be compared: {'; '.join(differences)}. Measure a baseline here with --save"
            )

    def changes(self, rows: list[Row]) -> list[Change]:
        """The rows that are in both. The parts of a step are left out: they are timed too seldom to be judged."""
        return [
            Change(row.name, self.seconds[row.name], row.seconds)
            for row in rows
            if row.name in self.seconds and row.name.count("/") < 2
        ]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What was other then, in words. A model is what its shape says, whatever its name."""
    found = []
    for key in now.keys() - {"model", "sections"}:
        if before.get(key) != now[key]:
            named = "model" if key == "config" else key
            found.append(f"{named} was {before.get(named)}, is {now[named]}")
    return sorted(found)


def file_name(path: Path) -> str:
    """As messages have it."""
    return "stdin" if path == STDIN else str(path)


def read_baseline(path: Path) -> Baseline:
    """What ``benchmarking.Benchmark.save`` wrote; "-" is stdin. DataError where the file is something else."""
    file = file_name(path)
    try:
        content = json.loads(sys.stdin.buffer.read() if path == STDIN else path.read_bytes())
        if content["schema"] != SCHEMA:
            raise DataError(f"{file}: found schema {content['schema']}, expected {SCHEMA}; measure it anew with --save")
        seconds = {str(row["name"]): float(row["seconds"]) for row in content["rows"]}
        machine, settings = dict(content["machine"]), dict(content["settings"])
        dict(settings["sections"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: found no saved benchmark ({type(error).__name__}: {error}), expected what --save writes"
        ) from None
    return Baseline(file, machine, settings, seconds)


def this_machine() -> dict[str, Any]:
    """What makes times comparable."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor_name(),
        "cores": available_cores(),
    }
