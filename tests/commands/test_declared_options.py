from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from llmc_cli.commands.declared_options import with_options
from llmc_cli.training.options import option


@dataclass(frozen=True)
class Settings:
    count: int = option(3, "--count -c", "Panel", "How many.", min=1)
    kind: str = option("a", "--kind", "Panel", "Which.", choices=("a", "b"))
    flag: bool = option(True, "--flag -f", "Panel", "Whether.", zero_one=True)
    maybe: bool | None = option(None, "--maybe", "Panel", "Perhaps.", zero_one=True)
    switch: bool = option(True, "--switch/--no-switch", "Panel", "On or off.")


def invoke(*arguments):
    """Return the exit code of a command with ``arguments``, and the settings and the other option that it received."""
    received = []
    app = typer.Typer()

    @app.command()
    @with_options(Settings)
    def command(settings: Settings, other: Annotated[int, typer.Option("--other")] = 0) -> None:
        received.append((settings, other))

    return CliRunner().invoke(app, arguments).exit_code, *received


def test_defaults():
    assert invoke() == (0, (Settings(), 0))


def test_values_reach_the_fields():
    expected = Settings(count=5, kind="b", flag=False, maybe=True, switch=False)
    arguments = "-c", "5", "--kind", "b", "-f", "0", "--maybe", "1", "--no-switch", "--other", "7"
    assert invoke(*arguments) == (0, (expected, 7))


@pytest.mark.parametrize("arguments", [["-c", "0"], ["-f", "2"], ["--maybe", "-1"], ["-c", "x"]])
def test_values_out_of_range_are_refused(arguments):
    assert invoke(*arguments) == (2,)
