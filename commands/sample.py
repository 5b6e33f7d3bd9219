"""`llmc sample`."""

from llmc_cli.commands import options
from llmc_cli.errors import MissingError


def sample(quiet: options.Quiet = False) -> None:
    """Not there yet."""
    raise MissingError("sample: not yet")
