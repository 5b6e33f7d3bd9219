"""`llmc verify`."""

from llmc_cli.commands import options
from llmc_cli.errors import MissingError


def verify(quiet: options.Quiet = False) -> None:
    """Not there yet."""
    raise MissingError("verify: not yet")
