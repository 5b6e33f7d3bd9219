"""Documents to token files: encoded by several processes, written in order, in place only when all is there.

Memory is bounded by the workers' batches, whatever the size of the input; the files do not depend on the number of
workers.
"""

import contextlib
import itertools
import multiprocessing
import re
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmc_cli.data.documents import Piece
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.shard import MAX_TOKENS, ShardWriter
from llmc_cli.tokenizer.tokenizer import Tokenizer, load_tokenizer

BATCH = 1 << 21  # characters that a worker encodes at a time
SHARD_TOKENS = 10**8
VAL_TOKENS = 32_768
VAL_SHARE = 10  # a text shorter than this many times VAL_TOKENS gives this fraction of itself, unless told otherwise

Tokens = NDArray[np.int32]
Batch = list[Piece]


@dataclass(frozen=True)
class ShardPlan:
    """What files are to be made in ``folder``.

    ``name``_val.bin and ``name``_train.bin, or, where one file cannot hold the training tokens, ``name``_val_000000.bin
    and ``name``_train_000001.bin and on. ``headerless``: int32 ids without a header. ``val_tokens`` None: VAL_TOKENS,
    or a tenth of a short text; 0: no validation file.
    """

    folder: Path
    name: str
    headerless: bool = False
    shard_tokens: int = SHARD_TOKENS
    val_tokens: int | None = None
    workers: int = 1

    def check(self) -> None:
        """Raise UsageError for what cannot be."""
        if not 0 < self.shard_tokens <= MAX_TOKENS:
            raise UsageError(f"a shard of {self.shard_tokens:,} tokens: expected 1 to {MAX_TOKENS:,}")
        if self.val_tokens is not None and not 0 <= self.val_tokens <= self.shard_tokens:
            raise UsageError(
                f"{self.val_tokens:,} validation tokens: expected 0 to the {self.shard_tokens:,} of a shard"
            )


@dataclass(frozen=True)
class TokenFile:
    path: Path
    split: str  # val or train
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TokenFiles:
    """The files that were made, validation first, and those of an earlier, longer run that had to go."""

    files: tuple[TokenFile, ...]
    removed: tuple[Path, ...]

    @property
    def tokens(self) -> int:
        return sum(file.tokens for file in self.files)


def write_token_files(pieces: Iterable[Piece], tokenizer: Tokenizer, plan: ShardPlan) -> TokenFiles:
    """Encode ``pieces`` and make the files of ``plan``.

    The first tokens are for validation. Earlier files of these names are replaced when all new ones are complete;
    shards of an earlier run that the new set does not have are removed, or a trainer would mix the two. Raises
    UsageError for a tokenizer that cannot encode, DataError where the text gives nothing to train on.
    """
    plan.check()
    tokenizer.encode("")  # a tokenizer that cannot encode says so before anything is begun
    kind = Kind.HEADERLESS if plan.headerless else shard_kind(tokenizer)
    with contextlib.closing(encoded(_batches(pieces), tokenizer, plan.workers)) as arrays:
        val, train = _split(arrays, plan.val_tokens)
        plan.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{plan.name}.", suffix=".part", dir=plan.folder))
        try:
            written = _write(iter([val]), staging, "val", kind, plan.shard_tokens)
            written += _write(train, staging, "train", kind, plan.shard_tokens)
            return _put_in_place(written, plan)
        finally:
            shutil.rmtree(staging)


def shard_kind(tokenizer: Tokenizer) -> Kind:
    """The shard that can hold the tokenizer's ids: uint16 as for GPT-2, else uint32 as for Llama 3."""
    return Kind.SHARD_GPT2 if tokenizer.vocab_size <= 1 << 16 else Kind.SHARD_LLAMA3


def _split(arrays: Iterator[Tokens], val_tokens: int | None) -> tuple[Tokens, Iterator[Tokens]]:
    """The validation tokens, and the rest as a stream that is not empty."""
    enough = VAL_SHARE * VAL_TOKENS if val_tokens is None else val_tokens + 1
    head: list[Tokens] = []
    length = 0
    while length < enough and (array := next(arrays, None)) is not None:
        head.append(array)
        length += array.size
    if length == 0:
        raise DataError("there is no text to encode: the input is empty or white space only")
    if val_tokens is None:
        val_tokens = min(VAL_TOKENS, length // VAL_SHARE)
    if length <= val_tokens:
        raise DataError(
            f"the text gives {length:,} tokens, of which {val_tokens:,} for validation leave nothing to train on; "
            "give more text or a smaller --val-tokens"
        )
    tokens = np.concatenate(head)
    return tokens[:val_tokens], itertools.chain([tokens[val_tokens:]], arrays)


def _write(arrays: Iterator[Tokens], folder: Path, split: str, kind: Kind, shard_tokens: int) -> list[TokenFile]:
    """The tokens in files of ``shard_tokens`` each, the last one shorter; none where there are none."""
    paths: list[Path] = []
    counts: list[int] = []
    with contextlib.ExitStack() as stack:
        room = 0
        for array in arrays:
            at = 0
            while at < array.size:
                if room == 0:
                    stack.close()  # the full shard is complete
                    paths.append(folder / f"{split}_{len(paths):06d}")
                    counts.append(0)
                    writer = stack.enter_context(ShardWriter(paths[-1], kind))
                    room = shard_tokens
                taken = array[at : at + room]
                writer.write(taken)
                counts[-1] += taken.size
                at += taken.size
                room -= taken.size
    return [TokenFile(path, split, count, path.stat().st_size) for path, count in zip(paths, counts, strict=True)]


def _put_in_place(written: list[TokenFile], plan: ShardPlan) -> TokenFiles:
    """Give all files their names, and remove those of an earlier run that are none of them."""
    several = sum(file.split == "train" for file in written) > 1
    files: list[TokenFile] = []
    number = 1  # of the next training shard; 0 is the validation shard's
    for file in written:
        suffix = ""
        if several:
            suffix = "_000000" if file.split == "val" else f"_{number:06d}"
            number += file.split == "train"
        path = plan.folder / f"{plan.name}_{file.split}{suffix}.bin"
        file.path.replace(path)
        files.append(TokenFile(path, file.split, file.tokens, file.bytes))
    names = re.compile(re.escape(plan.name) + r"_(train|val)(_\d{6})?\.bin")
    current = {file.path for file in files}
    removed = sorted(path for path in plan.folder.iterdir() if names.fullmatch(path.name) and path not in current)
    for path in removed:
        path.unlink()
    return TokenFiles(tuple(files), tuple(removed))


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
