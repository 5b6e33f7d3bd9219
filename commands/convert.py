"""`llmc convert`."""

from llmc_cli.commands import options
from llmc_cli.errors import MissingError


def convert(quiet: options.Quiet = False) -> None:
    """Not there yet."""
    raise MissingError("convert: not yet")
