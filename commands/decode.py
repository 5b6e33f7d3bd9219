"""`llmc decode`."""

from llmc_cli.commands import options
from llmc_cli.errors import MissingError


def decode(quiet: options.Quiet = False) -> None:
    """Not there yet."""
    raise MissingError("decode: not yet")
