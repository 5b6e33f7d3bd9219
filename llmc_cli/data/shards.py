"""Write documents to token files: encode them in worker processes and write the ids in order.

The files are moved into place only after all of them are complete. Memory use is bounded by the batches of the workers
and does not depend on the input size; the files do not depend on the number of workers.
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
from llmc_cli.data.encoding import Tokens, encode_batches, group_pieces
from llmc_cli.data.shard_plan import VAL_FRACTION, VAL_TOKENS, ShardPlan
from llmc_cli.errors import DataError
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.shard import ShardWriter
from llmc_cli.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class TokenFile:
    path: Path
    split: str  # val or train
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TokenFiles:
    """The files written, validation first, and the files of an earlier run that were removed."""

    files: tuple[TokenFile, ...]
    removed: tuple[Path, ...]

    @property
    def tokens(self) -> int:
        return sum(file.tokens for file in self.files)


def write_token_files(pieces: Iterable[Piece], tokenizer: Tokenizer, plan: ShardPlan) -> TokenFiles:
    """Encode ``pieces`` and write the files of ``plan``. The first tokens are the validation split.

    Existing files with these names are replaced once all new files are complete. Other shards of an earlier run with
    the same ``plan.name`` are removed, because a trainer would read them too. Raises UsageError for a tokenizer that
    cannot encode, DataError if no tokens remain for training.
    """
    plan.check()
    tokenizer.encode("")  # fail before any work if the tokenizer cannot encode
    kind = Kind.HEADERLESS if plan.headerless else shard_kind(tokenizer)
    with contextlib.closing(encode_batches(group_pieces(pieces), tokenizer, plan.workers)) as arrays:
        val, train = _split(arrays, plan.val_tokens)
        plan.folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{plan.name}.", suffix=".part", dir=plan.folder))
        try:
            written = _write(iter([val]), staging, "val", kind, plan.shard_tokens)
            written += _write(train, staging, "train", kind, plan.shard_tokens)
            return _move_into_place(written, plan)
        finally:
            shutil.rmtree(staging)


def shard_kind(tokenizer: Tokenizer) -> Kind:
    """Return the shard format that holds the tokenizer's ids: uint16 as for GPT-2, else uint32 as for Llama 3."""
    return Kind.SHARD_GPT2 if tokenizer.vocab_size <= 1 << 16 else Kind.SHARD_LLAMA3


def _split(arrays: Iterator[Tokens], val_tokens: int | None) -> tuple[Tokens, Iterator[Tokens]]:
    """Return the validation tokens and a non-empty stream of the training tokens."""
    required = VAL_FRACTION * VAL_TOKENS if val_tokens is None else val_tokens + 1
    head: list[Tokens] = []
    length = 0
    while length < required and (array := next(arrays, None)) is not None:
        head.append(array)
        length += array.size
    if length == 0:
        raise DataError("there is no text to encode: the input is empty or contains only whitespace")
    if val_tokens is None:
        val_tokens = min(VAL_TOKENS, length // VAL_FRACTION)
    if length <= val_tokens:
        raise DataError(
            f"the text has {length:,} tokens; {val_tokens:,} validation tokens leave none for training: "
            "give more text or a smaller --val-tokens"
        )
    tokens = np.concatenate(head)
    return tokens[:val_tokens], itertools.chain([tokens[val_tokens:]], arrays)


def _write(arrays: Iterator[Tokens], folder: Path, split: str, kind: Kind, shard_tokens: int) -> list[TokenFile]:
    """Write the tokens to files of ``shard_tokens`` each; the last file may be shorter. No tokens give no file."""
    paths: list[Path] = []
    counts: list[int] = []
    with contextlib.ExitStack() as stack:
        remaining = 0
        for array in arrays:
            start = 0
            while start < array.size:
                if remaining == 0:
                    stack.close()  # completes the previous shard
                    paths.append(folder / f"{split}_{len(paths):06d}")
                    counts.append(0)
                    writer = stack.enter_context(ShardWriter(paths[-1], kind))
                    remaining = shard_tokens
                tokens = array[start : start + remaining]
                writer.write(tokens)
                counts[-1] += tokens.size
                start += tokens.size
                remaining -= tokens.size
    return [TokenFile(path, split, count, path.stat().st_size) for path, count in zip(paths, counts, strict=True)]


def _move_into_place(written: list[TokenFile], plan: ShardPlan) -> TokenFiles:
    """Rename the files to their final names, then remove other files of an earlier run."""
    numbered = sum(file.split == "train" for file in written) > 1
    files: list[TokenFile] = []
    number = 1  # of the next training shard; the validation shard has number 0
    for file in written:
        suffix = ""
        if numbered:
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
