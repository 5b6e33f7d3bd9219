"""Encode texts to tokens, in worker processes."""

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

Tokens = NDArray[np.int32]


Batch = list[Piece]

BATCH = 1 << 21  # characters that a worker encodes at a time


def _batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """``pieces`` in lists of about BATCH characters."""
    batch: Batch = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece.text)
        if length >= BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer: Tokenizer, batch: Batch) -> Tokens:
    """The ids of all pieces, end-of-text before each that starts a document."""
    end = np.array([tokenizer.end_of_text], np.int32)
    arrays: list[Tokens] = []
    for piece in batch:
        if piece.starts:
            arrays.append(end)
        arrays.append(tokenizer.encode(piece.text))
    return np.concatenate(arrays)


def encoded(batches: Iterator[Batch], tokenizer: Tokenizer, workers: int) -> Generator[Tokens, None, None]:
    """The ids of each batch, in order. No more processes are started than there are batches; for one, none is."""
    first = list(itertools.islice(batches, workers))
    if len(first) <= 1:
        for batch in itertools.chain(first, batches):
            yield encode_batch(tokenizer, batch)
        return
    lanes: deque[_Lane] = deque()  # the one whose answer comes next stands first
    try:
        for _ in first:
            lanes.append(_Lane(tokenizer.name))
        for lane, batch in zip(lanes, first, strict=True):
            lane.send(batch)
        for batch in batches:
            tokens = lanes[0].receive()
            lanes[0].send(batch)
            lanes.rotate(-1)
            yield tokens
        for lane in lanes:
            yield lane.receive()
    finally:
        for lane in lanes:
            lane.stop()


class _Lane:
    """A worker process and the pipe to it. At most one batch is under way, so neither end ever waits for the other to
    make room. Processes are spawned: a fork would copy the locks of threads, but not the threads."""

    def __init__(self, tokenizer: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, tokenizer), daemon=True)
        with _interrupts_held():
            self._process.start()
        far_end.close()  # the worker has the only one left, so that its end is noticed here

    def send(self, batch: Batch) -> None:
        try:
            self._connection.send(batch)
        except OSError:
            raise self._crash() from None

    def receive(self) -> Tokens:
        """The ids of the batch that was sent. Raises MissingError where the worker is gone."""
        try:
            answer: Tokens | str = self._connection.recv()
        except (EOFError, OSError):
            raise self._crash() from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def _crash(self) -> MissingError:
        self._process.join(5)
        return MissingError(
            f"a worker ended with exit code {self._process.exitcode} while it encoded, perhaps for want of memory; "
            "nothing was written: try fewer --workers"
        )

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, name: str) -> None:
    """A worker's life: batches in, ids out, until the pipe or the process is ended. What goes wrong is sent as text."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where _interrupts_held cannot: the parent sees to the end
    try:
        tokenizer = load_tokenizer(name)
        while True:
            connection.send(encode_batch(tokenizer, connection.recv()))
    except EOFError:
        pass  # the parent is gone
    except Exception as error:
        with contextlib.suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started in the block never see Ctrl-C, which the terminal sends to all."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
