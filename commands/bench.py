"""`llmc bench`."""

from llmc_cli.commands import options
from llmc_cli.errors import MissingError


def bench(quiet: options.Quiet = False) -> None:
    """Not there yet."""
    raise MissingError("bench: not yet")
