"""A worker process that crashes. A separate module, because spawned processes import it by name."""

import os


def crash(connection, tokenizer_name):
    """Receive one batch, then exit with status 7."""
    connection.recv()
    os._exit(7)
