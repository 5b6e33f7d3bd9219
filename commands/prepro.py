"""`llmc prepro`: encode text to token files."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc_cli.commands import options
from llmc_cli.commands.render import Output, format_duration, format_size
from llmc_cli.data.shard_plan import SHARD_TOKENS, VAL_FRACTION, VAL_TOKENS, ShardPlan
from llmc_cli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmc_cli.data.documents import Piece
    from llmc_cli.data.shards import TokenFiles
    from llmc_cli.tokenizer.base import Tokenizer

FILE_PREFIXES = {
    "tinyshakespeare": "tiny_shakespeare",
    "text": "text",
    "tinystories": None,
    "fineweb": None,
    "fineweb-edu": None,
    "hellaswag": None,
    "mmlu": None,
}
"""Data sets, and how the names of their token files begin; None: not implemented yet."""

DEFAULT_VAL_TOKENS = f"{VAL_TOKENS}; for text, at most 1/{VAL_FRACTION} of the tokens"


class Format(StrEnum):
    shard = "shard"
    headerless = "headerless"


def prepro(
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="Data set: tinyshakespeare, or text for files of your own.")
    ],
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE", help="Input files of the data set text: .txt, .jsonl, or - for stdin."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", show_default="data/DATASET", help="Output directory.")] = None,
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer",
            metavar="gpt2|FILE",
            help="Tokenizer: gpt2, a tokenizer.json, or a folder that contains one.",
        ),
    ] = "gpt2",
    format_: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Output format. shard: a header and uint16 tokens (uint32 for more than 65,536 token ids). "
            "headerless: int32 tokens only.",
        ),
    ] = Format.shard,
    shard_tokens: Annotated[
        int, typer.Option("--shard-tokens", metavar="N", min=1, help="Maximum number of tokens per file.")
    ] = SHARD_TOKENS,
    val_tokens: Annotated[
        int | None,
        typer.Option(
            "--val-tokens",
            metavar="N",
            min=0,
            show_default=DEFAULT_VAL_TOKENS,
            help="Number of tokens, from the start of the text, to use for validation.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            show_default="the cores this process may use",
            help="Number of worker processes.",
        ),
    ] = None,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            metavar="auto|bundled|download|PATH",
            help="Text for tinyshakespeare. download: the original. bundled: a similar text that is installed with "
            "llmc. auto: the original, or the bundled text if the download fails. PATH: a text file.",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Encode text to token files for training.

    `llmc prepro tinyshakespeare` writes data/tinyshakespeare/tiny_shakespeare_{train,val}.bin.

    `llmc prepro text FILE...` writes data/text/text_{train,val}.bin. If the training tokens do not fit into one file,
    it writes text_val_000000.bin, text_train_000001.bin and so on. A .txt file is one document, or several documents
    separated by lines that contain only <|endoftext|>. Each line of a .jsonl file is one document: the string under
    "text".
    """
    from llmc_cli.data.shards import write_token_files
    from llmc_cli.machine.cores import available_cores
    from llmc_cli.tokenizer.tokenizer import load_tokenizer

    files = files or []
    output = Output(json, quiet)
    prefix = file_prefix(dataset)
    check_input(dataset, files, source)
    if dataset == "tinyshakespeare" and val_tokens is None:
        val_tokens = VAL_TOKENS
    plan = ShardPlan(
        folder=out or Path("data") / dataset,
        name=prefix,
        headerless=format_ is Format.headerless,
        shard_tokens=shard_tokens,
        val_tokens=val_tokens,
        workers=workers or available_cores(),
    )
    plan.check()
    encoder = load_tokenizer(tokenizer)
    if dry_run:
        print_plan(output, dataset, files, source, encoder, plan)
        return
    start = time.monotonic()
    if dataset == "tinyshakespeare":
        origin, pieces = load_shakespeare(output, source)
        result = write_token_files(pieces, encoder, plan)
    else:
        from llmc_cli.data.documents import input_bytes, read_documents

        origin = " ".join(files)
        with output.progress("encoding", input_bytes(files), format_size) as on_progress:
            result = write_token_files(read_documents(files, sys.stdin.buffer, on_progress), encoder, plan)
    print_result(output, dataset, origin, encoder, result, time.monotonic() - start)


def file_prefix(dataset: str) -> str:
    """Return the prefix of the data set's file names. Raises UsageError or MissingError for an unavailable data set."""
    available = " or ".join(name for name, prefix in FILE_PREFIXES.items() if prefix)
    if dataset not in FILE_PREFIXES:
        raise UsageError(f"unknown data set {dataset!r}: expected {available}")
    prefix = FILE_PREFIXES[dataset]
    if prefix is None:
        raise MissingError(f"data set {dataset}: not implemented yet; expected {available}")
    return prefix


def check_input(dataset: str, files: list[str], source: str) -> None:
    """Raise an error for files or a source that do not fit the data set or cannot be read."""
    if dataset == "tinyshakespeare":
        if files:
            raise UsageError(
                f"tinyshakespeare takes no files (found {files[0]}); use --source PATH, or `llmc prepro text FILE`"
            )
        if source not in ("auto", "bundled", "download"):
            with Path(source).open("rb"):
                pass
        return
    from llmc_cli.data.documents import check_files

    if source != "auto":
        raise UsageError("--source is only for tinyshakespeare; give the files of `llmc prepro text` as arguments")
    if not files:
        raise UsageError("`llmc prepro text` needs at least one FILE: .txt, .jsonl, or - for text from stdin")
    check_files(files)


def load_shakespeare(output: Output, source: str) -> tuple[str, "Iterator[Piece]"]:
    """Return the origin of the text and its sections."""
    from llmc_cli.data import tinyshakespeare

    with output.progress("downloading", tinyshakespeare.SIZE, format_size) as on_progress:
        text = tinyshakespeare.shakespeare_text(source, lambda done, total: on_progress(done))
    if text.fallback_reason:
        output.warning(f"{text.fallback_reason}; using the bundled plays instead of the original Tiny Shakespeare")
    return text.origin, tinyshakespeare.shakespeare_sections(text.text)


def print_result(
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
        output.info(f"removed {path}, written by an earlier run")
    output.info(f"{result.tokens:,} tokens in {format_duration(elapsed)}, {result.tokens / elapsed:,.0f} tokens/s")


def print_plan(
    output: Output, dataset: str, files: list[str], source: str, tokenizer: "Tokenizer", plan: ShardPlan
) -> None:
    """Print the plan. Tokens are not counted, because that requires encoding the text."""
    from llmc_cli.data.shards import shard_kind

    splits = ("val", "train") if plan.val_tokens != 0 else ("train",)
    paths = [str(plan.folder / f"{plan.name}_{split}.bin") for split in splits]
    values: dict[str, str | int | list[str] | None] = {
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
        output.print_json({"dry_run": True, **values})
        return
    shown = {**values, "files": ", ".join(paths)}
    if plan.val_tokens is None:
        shown["val_tokens"] = DEFAULT_VAL_TOKENS
    output.print_table(("setting", "value"), [(name, str(value)) for name, value in shown.items()])
