"""`llmc decode`: decode token ids to text."""

import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from llmc_cli.commands import options
from llmc_cli.commands.render import Output
from llmc_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from llmc_cli.tokenizer.text_stream import TextStream

BLOCK = 1 << 16  # bytes read from stdin, or tokens decoded from a shard, at once
MAX_DIGITS = 10  # of a token id
TEXT_BREAK = None

Ids = Iterator[list[int] | None]
"""Lists of ids; TEXT_BREAK separates one text from the next."""


class Special(StrEnum):
    show = "show"
    skip = "skip"


def decode(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="IDS|FILE.bin",
            help="Token ids, or token shards. Without arguments, read ids from stdin, as with -.",
        ),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="gpt2|FILE",
            help="Tokenizer: gpt2, a tokenizer.json (or a folder that contains one), or a tokenizer table (.bin).",
        ),
    ] = "gpt2",
    special: Annotated[
        Special, typer.Option("--special", help="Whether to show or skip special tokens such as end-of-text.")
    ] = Special.skip,
    offset: Annotated[
        int | None, typer.Option("--offset", metavar="N", min=0, help="Number of tokens to skip at the start.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=0, help="Maximum number of tokens to decode."),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Decode token ids to text.

    Ids on stdin are separated by whitespace and decoded as they arrive. A line with several ids is decoded as a
    separate text. Consecutive lines with a single id are joined into one text. Each text is followed by a newline.
    Bytes that are not UTF-8 are replaced by U+FFFD.
    """
    from llmc_cli.tokenizer.text_stream import TextStream
    from llmc_cli.tokenizer.tokenizer import load_tokenizer

    words = ids or ["-"]
    kinds = {input_kind(word) for word in words}
    if len(kinds) > 1:
        raise UsageError(f"found {' and '.join(sorted(kinds))} together; give only one kind of input")
    if kinds != {"shards"} and (offset is not None or limit is not None):
        raise UsageError("--offset and --limit are only for shards (FILE.bin)")
    start = offset or 0
    stream = TextStream(load_tokenizer(tokenizer), special is Special.show, start)
    if kinds == {"shards"}:
        source = read_shards([Path(word) for word in words], start, limit)
    elif kinds == {"stdin"}:
        source = read_stream(sys.stdin.buffer)
    else:
        source = iter([parse_ids(" ".join(words).split(), 0)])
    texts = decode_stream(source, stream)
    output = Output(json, quiet)
    if json:
        text = "".join(texts).removesuffix("\n")
        output.print_json({"tokens": stream.position - start, "text": text})
    else:
        for text in texts:
            output.write(text)


def input_kind(word: str) -> str:
    """Return the kind of input that an argument names."""
    if word == "-":
        return "stdin"
    return "shards" if word.endswith(".bin") else "ids"


def parse_ids(words: list[str], position: int) -> list[int]:
    """Return the ids written in ``words``. Raises DataError for a word that is not a token id.

    ``position`` is the position of the first id, for error messages.
    """
    for index, word in enumerate(words):
        if not (word.isascii() and word.isdigit() and len(word) <= MAX_DIGITS):
            shown = word if len(word) <= 2 * MAX_DIGITS else f"{word[: 2 * MAX_DIGITS]}…"
            raise DataError(f"found {shown!r} at position {position + index}, expected a token id")
    return [int(word) for word in words]


def read_stream(file: BinaryIO) -> Ids:
    """Yield the ids in ``file``, each as soon as whitespace or the end of the file follows it.

    A newline after a line of several ids ends a text, so that `llmc sample --num 2 --ids` gives two texts. After a
    line with one id it is ordinary whitespace.
    """
    position = 0
    in_line = 0  # ids on the current line so far
    rest = ""  # a word that may continue in the next block
    while chunk := file.read1(BLOCK):  # type: ignore[attr-defined]
        *lines, last = (rest + chunk.decode("ascii", "replace")).split("\n")
        for line in lines:
            ids = parse_ids(line.split(), position)
            position += len(ids)
            in_line += len(ids)
            yield ids
            if in_line > 1:
                yield TEXT_BREAK
            in_line = 0
        words = last.split()
        rest = words.pop() if words and not last[-1].isspace() and len(words[-1]) <= MAX_DIGITS else ""
        ids = parse_ids(words, position)
        position += len(ids)
        in_line += len(ids)
        yield ids
    yield parse_ids(rest.split(), position)


def read_shards(paths: list[Path], offset: int, limit: int | None) -> Ids:
    """Yield at most ``limit`` ids of the concatenated shards, starting at ``offset``."""
    from llmc_cli.formats.shard import read_shard

    shards = [read_shard(path).tokens for path in paths]
    count = sum(tokens.size for tokens in shards)
    if offset > count:
        raise UsageError(f"--offset {offset:,} is beyond the end of the shards: found {count:,} tokens")
    remaining = count - offset if limit is None else min(limit, count - offset)
    for tokens in shards:
        selected = tokens[offset : offset + remaining]
        offset = max(0, offset - tokens.size)
        remaining -= selected.size
        for start in range(0, selected.size, BLOCK):
            yield selected[start : start + BLOCK].tolist()


def decode_stream(source: Ids, stream: "TextStream") -> Iterator[str]:
    """Yield the text of ``source`` incrementally, with a newline after each text. Without ids, yield nothing."""
    started = False
    for ids in source:
        if ids is TEXT_BREAK:
            yield stream.finish() + "\n"
            started = False
        elif ids:
            yield stream.feed(ids)
            started = True
    if started:
        yield stream.finish() + "\n"
