"""`llmc prepro`."""

from llmc_cli.commands import options
from llmc_cli.errors import MissingError


def prepro(quiet: options.Quiet = False) -> None:
    """Not there yet."""
    raise MissingError("prepro: not yet")
