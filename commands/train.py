"""`llmc train`."""

from llmc_cli.commands import options
from llmc_cli.errors import MissingError


def train(quiet: options.Quiet = False) -> None:
    """Not there yet."""
    raise MissingError("train: not yet")
