"""Documents to token files: encoded by several processes, written in order, in place only when all is there.

Memory is bounded by the workers' batches, whatever the size of the input; the files do not depend on the number of
workers.
"""

import contextlib
import itertools
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmc_cli.data.documents import Piece
from llmc_cli.data.encoding import Tokens, _batches, encoded
from llmc_cli.errors import DataError, UsageError
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.shard import MAX_TOKENS, ShardWriter
from llmc_cli.tokenizer.base import Tokenizer

SHARD_TOKENS = 10**8
VAL_TOKENS = 32_768
VAL_SHARE = 10  # a text shorter than this many times VAL_TOKENS gives this fraction of itself, unless told otherwise


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
