"""A worker process that fails; in a module of its own, since a new process has to import it by name."""

import os


def crash(connection, name):
    """Wait for the first batch, then exit with status 7."""
    connection.recv()
    os._exit(7)
