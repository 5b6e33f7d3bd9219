"""`llmc convert`: models from one form into another."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmc_cli.commands import options
from llmc_cli.commands.render import Output, format_duration, format_size

if TYPE_CHECKING:
    from llmc_cli.conversion.conversion import Conversion
    from llmc_cli.conversion.sources import OnProgress
    from llmc_cli.conversion.writers import Written


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A model file (.bin), a folder as transformers writes it, or an id on its hub."
        ),
    ],
    dest: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="X.bin, or a folder that transformers can load.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option("--dtype", show_default="fp32", help="What DEST holds its weights in."),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            "--version", metavar="N", show_default="3, or 5 for bf16", help="Of a .bin: 1 or 3 is fp32, 5 is bf16."
        ),
    ] = None,
    order: Annotated[
        Literal["layers", "norms-last"] | None,
        typer.Option(
            "--order",
            show_default="found by content",
            help="Of the tensors in a .bin of version 2, which exists with the layernorms in their layers or last.",
        ),
    ] = None,
    debug_state: Annotated[
        Path | None,
        typer.Option("--debug-state", metavar="FILE", help="Write a batch with its logits, loss and gradients."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", metavar="B", min=1, show_default="4", help="Rows of that batch.")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", metavar="T", min=1, show_default="64, or what the model allows", help="Tokens in each row."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="SHARD",
            show_default="Tiny Shakespeare's validation shard",
            help="Where that batch comes from.",
        ),
    ] = None,
    reference: Annotated[
        Literal["torch", "numpy"] | None,
        typer.Option("--reference", show_default="torch where it is installed", help="What computes that batch."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="FILE", help="Write the table of the model's tokens.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert a model, and write what belongs to it.

    `llmc convert gpt2` fetches GPT-2 from the Hugging Face hub and writes gpt2_124M.bin, gpt2_124M_bf16.bin,
    gpt2_124M_debug_state.bin and gpt2_tokenizer.bin. Models of other names, and folders of one's own, take a DEST:
    `llmc convert openai-community/gpt2-xl gpt2_1558M.bin`. Back again: `llmc convert gpt2_1558M.bin my-gpt2`.

    A debug state is computed in float64, and takes about 30 bytes of memory a parameter.
    """
    from llmc_cli.conversion.conversion import plan
    from llmc_cli.conversion.targets import Request

    output = Output(json, quiet)
    start = time.monotonic()
    request = Request(
        source=source,
        dest=dest,
        dtype=dtype,
        version=version,
        order="norms last" if order == "norms-last" else order,
        debug_state=debug_state,
        batch=batch,
        seq_len=seq_len,
        data=data,
        reference=reference,
        tokenizer=tokenizer,
    )
    with bars(output) as tell:
        conversion = plan(request, tell, output.warning)
        files = []
        for file in conversion.run(tell):
            if not json:
                output.print_line(f"writing {file.content} to {file.path}")
            files.append(file)
    if json:
        output.print_json(document(conversion, files))
    total = sum(file.bytes for file in files)
    output.info(f"{format_size(total)} in {format_duration(time.monotonic() - start)}")


@contextlib.contextmanager
def bars(output: Output) -> Iterator["OnProgress"]:
    """Progress of one thing after another, each shown from its first word to the first word of the next."""
    with contextlib.ExitStack() as stack:
        current: str | None = None
        show: Any = None

        def tell(what: str, done: int, total: int | None) -> None:
            nonlocal current, show
            if what != current:
                stack.close()
                current, show = what, stack.enter_context(output.progress(what, total, format_size))
            show(done)

        yield tell


def document(conversion: "Conversion", files: list["Written"]) -> dict[str, Any]:
    config = conversion.source.config
    return {
        "source": conversion.request.source,
        "model": {
            "max_seq_len": config.max_seq_len,
            "vocab_size": config.vocab_size,
            "padded_vocab_size": config.padded_vocab_size,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "channels": config.channels,
        },
        "reference": conversion.reference,
        "files": [{"path": str(file.path), "content": file.content, "bytes": file.bytes} for file in files],
    }
