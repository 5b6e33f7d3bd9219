"""Encode pieces of text to token ids, in parallel worker processes."""

import contextlib
import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection

import numpy as np
from numpy.typing import NDArray

from llmc_cli.data.documents import Piece
from llmc_cli.errors import MissingError
from llmc_cli.tokenizer.base import Tokenizer
from llmc_cli.tokenizer.tokenizer import load_tokenizer

BATCH_CHARACTERS = 1 << 21  # approximate size of a batch

Tokens = NDArray[np.int32]
Batch = list[Piece]


def group_pieces(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """Group ``pieces`` into batches of about BATCH_CHARACTERS."""
    batch: Batch = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece.text)
        if length >= BATCH_CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer: Tokenizer, batch: Batch) -> Tokens:
    """Return the ids of all pieces, with end-of-text before each piece that starts a document."""
    end = np.array([tokenizer.end_of_text], np.int32)
    arrays: list[Tokens] = []
    for piece in batch:
        if piece.starts_document:
            arrays.append(end)
        arrays.append(tokenizer.encode(piece.text))
    return np.concatenate(arrays)


def encode_batches(batches: Iterator[Batch], tokenizer: Tokenizer, workers: int) -> Generator[Tokens, None, None]:
    """Yield the ids of each batch, in order.

    Starts at most ``workers`` processes, and no more than there are batches. A single batch, or one worker, is encoded
    in this process.
    """
    first = list(itertools.islice(batches, workers))
    if len(first) <= 1:
        for batch in itertools.chain(first, batches):
            yield encode_batch(tokenizer, batch)
        return
    pool: deque[Worker] = deque()  # ordered by batch: the first worker returns the next result
    try:
        for _ in first:
            pool.append(Worker(tokenizer.name))
        for worker, batch in zip(pool, first, strict=True):
            worker.send(batch)
        for batch in batches:
            tokens = pool[0].receive()
            pool[0].send(batch)
            pool.rotate(-1)
            yield tokens
        for worker in pool:
            yield worker.receive()
    finally:
        for worker in pool:
            worker.stop()


class Worker:
    """An encoder process with a pipe to it.

    It processes one batch at a time, so that neither end blocks on a full pipe. The process is spawned, not forked: a
    fork copies the locks of other threads, but not the threads that would release them.
    """

    def __init__(self, tokenizer: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child_connection = context.Pipe()
        self.process = context.Process(target=run_worker, args=(child_connection, tokenizer), daemon=True)
        with _sigint_blocked():
            self.process.start()
        child_connection.close()  # only the worker's copy stays open, so that its exit closes the pipe

    def send(self, batch: Batch) -> None:
        """Start encoding a batch. Raises MissingError if the process has exited."""
        try:
            self._connection.send(batch)
        except OSError:
            raise self._exited() from None

    def receive(self) -> Tokens:
        """Wait for the ids of the batch. Raises MissingError if the process has exited, RuntimeError if it failed."""
        try:
            answer: Tokens | str = self._connection.recv()
        except (EOFError, OSError):
            raise self._exited() from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def _exited(self) -> MissingError:
        self.process.join(5)
        return MissingError(
            f"a worker process exited with code {self.process.exitcode} while encoding, possibly out of memory; "
            "no files were written: try a smaller --workers"
        )

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()
        self._connection.close()


def run_worker(connection: Connection, tokenizer_name: str) -> None:
    """Encode batches received on ``connection`` until it is closed. An exception is sent back as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, where _sigint_blocked does nothing
    try:
        tokenizer = load_tokenizer(tokenizer_name)
        while True:
            connection.send(encode_batch(tokenizer, connection.recv()))
    except EOFError:
        pass  # the parent process has exited
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Block SIGINT in processes started inside the context: a terminal sends Ctrl-C to the whole process group, and
    the parent stops the workers itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
