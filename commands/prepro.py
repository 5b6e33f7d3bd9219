"""`llmc prepro`: text to token files."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc_cli.commands import options
from llmc_cli.commands.render import Output, format_duration, format_size
from llmc_cli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmc_cli.data.documents import Piece
    from llmc_cli.data.shards import ShardPlan, TokenFiles
    from llmc_cli.tokenizer.base import Tokenizer

FILE_NAMES = {"tinyshakespeare": "tiny_shakespeare", "text": "text"}
LATER = ("tinystories", "fineweb", "fineweb-edu", "hellaswag", "mmlu")


class Format(StrEnum):
    shard = "shard"
    headerless = "headerless"


def prepro(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="tinyshakespeare, or text with files of your own.")],
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="For text: .txt and .jsonl files, or - for text from stdin."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", show_default="data/DATASET", help="Where to.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option("--tokenizer", metavar="gpt2|FILE", help="GPT-2's, or a tokenizer.json (or a folder with one)."),
    ] = "gpt2",
    format_: Annotated[
        Format, typer.Option("--format", help="shard: with a header, uint16. headerless: bare int32.")
    ] = Format.shard,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", metavar="N", min=1, help="Tokens in a file, at most.")
    ] = 100_000_000,
    val_tokens: Annotated[
        int | None,
        typer.Option(
            "--val-tokens",
            metavar="N",
            min=0,
            show_default="32768; of a short text a tenth",
            help="The first N tokens are for validation.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=1, show_default="the cores it may use", help="Processes."),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="auto|bundled|download|PATH",
            help="For tinyshakespeare: the original by download, the plays that come with the program, or a file. "
            "auto: the original, or the bundled text where it cannot be had.",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Turn text into files of tokens to train on.

    `llmc prepro tinyshakespeare` makes data/tinyshakespeare/tiny_shakespeare_{train,val}.bin.

    `llmc prepro text FILE...` makes data/text/text_{train,val}.bin, or, where the tokens for training do not fit into
    one file, text_val_000000.bin, text_train_000001.bin and on. A .txt file is one document, or several where lines
    that hold only <|endoftext|> separate them; each line of a .jsonl file is one, the string under "text".
    """
    from llmc_cli.data.shards import ShardPlan, write_token_files
    from llmc_cli.machine.cores import available_cores
    from llmc_cli.tokenizer.tokenizer import load_tokenizer

    files = files or []
    output = Output(json, quiet)
    check(dataset, files, source)
    if dataset == "tinyshakespeare" and val_tokens is None:
        val_tokens = 32_768
    plan = ShardPlan(
        folder=out or Path("data") / dataset,
        name=FILE_NAMES[dataset],
        headerless=format_ is Format.headerless,
        shard_tokens=shard_tokens,
        val_tokens=val_tokens,
        workers=workers or available_cores(),
    )
    plan.check()
    encoder = load_tokenizer(tokenizer)
    if dry_run:
        show_plan(output, dataset, files, source, encoder, plan)
        return
    start = time.monotonic()
    if dataset == "tinyshakespeare":
        origin, pieces = shakespeare(output, source)
        result = write_token_files(pieces, encoder, plan)
    else:
        from llmc_cli.data.documents import input_bytes, read_documents

        origin = " ".join(files)
        with output.progress("encoding", input_bytes(files), format_size) as tell:
            result = write_token_files(read_documents(files, sys.stdin.buffer, tell), encoder, plan)
    show(output, dataset, origin, encoder, result, time.monotonic() - start)


def check(dataset: str, files: list[str], source: str) -> None:
    """Raise UsageError or MissingError for a data set that is not there, and files that do not go with it."""
    if dataset in LATER:
        raise MissingError(f"{dataset}: not yet; there are {' and '.join(FILE_NAMES)}")
    if dataset not in FILE_NAMES:
        raise UsageError(f"{dataset}: no such data set; known are {', '.join((*FILE_NAMES, *LATER))}")
    if dataset == "tinyshakespeare":
        if files:
            raise UsageError(f"tinyshakespeare takes no files (found {files[0]}); give --source PATH, or `prepro text`")
        if source not in ("auto", "bundled", "download"):
            with Path(source).open("rb"):
                pass
        return
    from llmc_cli.data.documents import check_files

    if source != "auto":
        raise UsageError("text takes its files as arguments; --source is for tinyshakespeare")
    if not files:
        raise UsageError("text takes files: .txt, .jsonl, or - for text from stdin")
    check_files(files)


def shakespeare(output: Output, source: str) -> tuple[str, "Iterator[Piece]"]:
    """Where the text came from, and its sections."""
    from llmc_cli.data.tinyshakespeare import TINY_SHAKESPEARE_BYTES, shakespeare_sections, shakespeare_text

    with output.progress("downloading", TINY_SHAKESPEARE_BYTES, format_size) as tell:
        text = shakespeare_text(source, lambda done, total: tell(done))
    if text.shortfall:
        output.warning(f"{text.shortfall}; the bundled plays are used instead of the original Tiny Shakespeare")
    return text.origin, shakespeare_sections(text.text)


def show(
    output: Output, dataset: str, origin: str, tokenizer: "Tokenizer", result: "TokenFiles", elapsed: float
) -> None:
    if output.json:
        output.print_json(
            {
                "dataset": dataset,
                "source": origin,
                "tokenizer": tokenizer.name,
                "tokens": result.tokens,
                "files": [
                    {"path": str(file.path), "split": file.split, "tokens": file.tokens, "bytes": file.bytes}
                    for file in result.files
                ],
                "removed": [str(path) for path in result.removed],
                "seconds": elapsed,
            }
        )
    else:
        for file in result.files:
            output.print_line(f"writing {file.tokens:,} tokens to {file.path}")
    for path in result.removed:
        output.info(f"removed {path}, a shard of an earlier run")
    output.info(f"{result.tokens:,} tokens in {format_duration(elapsed)}, {result.tokens / elapsed:,.0f} tokens/s")


def show_plan(
    output: Output, dataset: str, files: list[str], source: str, tokenizer: "Tokenizer", plan: "ShardPlan"
) -> None:
    """What would be done. Tokens are not counted: that is the work itself."""
    from llmc_cli.data.shards import shard_kind

    splits = ("val", "train") if plan.val_tokens != 0 else ("train",)
    paths = [str(plan.folder / f"{plan.name}_{split}.bin") for split in splits]
    facts: dict[str, str | int | list[str] | None] = {
        "dataset": dataset,
        "source": source if dataset == "tinyshakespeare" else " ".join(files),
        "tokenizer": tokenizer.name,
        "format": "headerless" if plan.headerless else shard_kind(tokenizer).value,
        "val_tokens": plan.val_tokens,
        "shard_tokens": plan.shard_tokens,
        "workers": plan.workers,
        "files": paths,
    }
    if output.json:
        output.print_json({"dry_run": True, **facts})
        return
    told = {**facts, "files": ", ".join(paths)}
    if plan.val_tokens is None:
        told["val_tokens"] = "32768, or a tenth of a short text"
    output.print_table(("what", "plan"), [(name, str(value)) for name, value in told.items()])
