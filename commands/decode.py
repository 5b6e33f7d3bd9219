"""`llmc decode`: token ids to text."""

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

BLOCK = 1 << 16
LONGEST_ID = 10  # digits; more are no id of any vocabulary
END_OF_BLOCK = None

Ids = Iterator[list[int] | None]
"""Ids as they come, and END_OF_BLOCK where a text ends and another begins."""


class Special(StrEnum):
    show = "show"
    skip = "skip"


def decode(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="IDS|FILE.bin", help="Token ids, or token shards; without any, or with -, stdin."),
    ] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer", metavar="gpt2|FILE", help="GPT-2's, a tokenizer.json, or a tokenizer table (.bin)."
        ),
    ] = "gpt2",
    special: Annotated[
        Special, typer.Option("--special", help="Special tokens such as end-of-text: leave them out, or show them.")
    ] = Special.skip,
    offset: Annotated[
        int | None, typer.Option("--offset", metavar="N", min=0, help="Tokens of the shards to pass over.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=0, help="Tokens of the shards to decode, at most.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn token ids into text.

    Ids on stdin are separated by white space and decoded as they come. A line of several ids is a text of its own; ids
    one a line are one text. Each text ends with a newline; bytes that are not UTF-8 become U+FFFD.
    """
    from llmc_cli.tokenizer.text_stream import TextStream
    from llmc_cli.tokenizer.tokenizer import load_tokenizer

    words = ids or ["-"]
    kinds = {kind(word) for word in words}
    if len(kinds) > 1:
        raise UsageError(f"found {' and '.join(sorted(kinds))} together; decode one kind at a time")
    if kinds != {"shards"} and (offset is not None or limit is not None):
        raise UsageError("--offset and --limit are for shards")
    start = offset or 0
    stream = TextStream(load_tokenizer(tokenizer), special is Special.show, start)
    if kinds == {"shards"}:
        source = from_shards([Path(word) for word in words], start, limit)
    elif kinds == {"stdin"}:
        source = from_stream(sys.stdin.buffer)
    else:
        source = iter([parsed(" ".join(words).split(), 0)])
    texts = decoded(source, stream)
    output = Output(json, quiet)
    if json:
        text = "".join(texts).removesuffix("\n")
        output.print_json({"tokens": stream.position - start, "text": text})
    else:
        for text in texts:
            output.write(text)


def kind(word: str) -> str:
    """What an argument is."""
    if word == "-":
        return "stdin"
    return "shards" if word.endswith(".bin") else "ids"


def parsed(words: list[str], position: int) -> list[int]:
    """The ids that ``words`` say, the first of which is number ``position``. Raises DataError for what says none."""
    for index, word in enumerate(words):
        if not (word.isascii() and word.isdigit() and len(word) <= LONGEST_ID):
            shown = word if len(word) <= 2 * LONGEST_ID else f"{word[: 2 * LONGEST_ID]}…"
            raise DataError(f"found {shown!r} at position {position + index}, expected a token id")
    return [int(word) for word in words]


def from_stream(file: BinaryIO) -> Ids:
    """The ids in ``file``, as soon as white space or its end shows that they are whole.

    A line break behind several ids ends a text, so that `llmc sample --num 2 --ids` gives two; behind a single one it
    is white space like any other.
    """
    position = 0
    in_line = 0  # ids on this line so far
    rest = ""  # of a word that may go on
    while chunk := file.read1(BLOCK):  # type: ignore[attr-defined]
        *lines, last = (rest + chunk.decode("ascii", "replace")).split("\n")
        for line in lines:
            ids = parsed(line.split(), position)
            position += len(ids)
            in_line += len(ids)
            yield ids
            if in_line > 1:
                yield END_OF_BLOCK
            in_line = 0
        words = last.split()
        rest = words.pop() if words and not last[-1].isspace() and len(words[-1]) <= LONGEST_ID else ""
        ids = parsed(words, position)
        position += len(ids)
        in_line += len(ids)
        yield ids
    yield parsed(rest.split(), position)


def from_shards(paths: list[Path], offset: int, limit: int | None) -> Ids:
    """The ids of all shards together, from ``offset`` on, ``limit`` of them or fewer."""
    from llmc_cli.formats.shard import read_shard

    shards = [read_shard(path).tokens for path in paths]
    count = sum(tokens.size for tokens in shards)
    if offset > count:
        raise UsageError(f"--offset {offset}: found only {count:,} tokens")
    left = count - offset if limit is None else min(limit, count - offset)
    for tokens in shards:
        wanted = tokens[offset : offset + left]
        offset = max(0, offset - tokens.size)
        left -= wanted.size
        for start in range(0, wanted.size, BLOCK):
            yield wanted[start : start + BLOCK].tolist()


def decoded(source: Ids, stream: "TextStream") -> Iterator[str]:
    """The text of ``source`` as it comes, each text with a newline at its end. No ids give nothing at all."""
    begun = False
    for ids in source:
        if ids is END_OF_BLOCK:
            yield stream.finish() + "\n"
            begun = False
        elif ids:
            yield stream.feed(ids)
            begun = True
    if begun:
        yield stream.finish() + "\n"
