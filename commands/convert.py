"""``llmc convert``."""

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
    from llmc_cli.conversion.writers import WrittenFile


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A model file (.bin), a Hugging Face model folder, or a model id on the Hugging Face Hub.",
        ),
    ],
    dest: Annotated[
        Path | None, typer.Argument(metavar="DEST", help="A model file (.bin), or a folder that transformers can load.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option("--dtype", show_default="fp32", help="Data type of the weights in DEST."),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            "--version",
            metavar="N",
            show_default="3, or 5 for bf16",
            help="Format version of a .bin file: 1 or 3 (fp32), or 5 (bf16).",
        ),
    ] = None,
    order: Annotated[
        Literal["layers", "norms-last"] | None,
        typer.Option(
            "--order",
            show_default="detected",
            help="Tensor order of SOURCE if it is a .bin of version 2. layers: layernorms stored with their layers. "
            "norms-last: all layernorms stored at the end.",
        ),
    ] = None,
    debug_state: Annotated[
        Path | None,
        typer.Option(
            "--debug-state",
            metavar="FILE",
            help="Write a debug state: a batch with the model's logits, loss and gradients.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", metavar="B", min=1, show_default="4", help="Batch size of the debug state."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len",
            metavar="T",
            min=1,
            show_default="64, or the model's maximum",
            help="Sequence length of the debug state.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="SHARD",
            show_default="Tiny Shakespeare's validation shard",
            help="Token shard from which the debug state's batch is read.",
        ),
    ] = None,
    reference: Annotated[
        Literal["torch", "numpy"] | None,
        typer.Option(
            "--reference",
            show_default="torch if installed",
            help="Reference implementation that computes the debug state.",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            help="Write the model's tokenizer table (.bin), which llm.c and `llmc decode --tokenizer` read.",
        ),
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Convert a model to another format; optionally write a debug state or a tokenizer table.

    `llmc convert gpt2` downloads GPT-2 from the Hugging Face Hub and writes gpt2_124M.bin, gpt2_124M_bf16.bin,
    gpt2_124M_debug_state.bin and gpt2_tokenizer.bin. Other models and local folders need a DEST:
    `llmc convert openai-community/gpt2-xl gpt2_1558M.bin`. To convert back to a Hugging Face folder:
    `llmc convert gpt2_1558M.bin my-gpt2`.

    A debug state is computed in float64, which takes about 30 bytes of memory per parameter.
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
    with progress_bars(output) as on_progress:
        conversion = plan(request, on_progress, output.warning)
        files = []
        for file in conversion.run(on_progress):
            if not json:
                output.print_line(f"writing {file.content} to {file.path}")
            files.append(file)
    if json:
        output.print_json(json_document(conversion, files))
    total = sum(file.bytes for file in files)
    output.info(f"{format_size(total)} in {format_duration(time.monotonic() - start)}")


@contextlib.contextmanager
def progress_bars(output: Output) -> Iterator["OnProgress"]:
    """Show a progress bar for each operation, until the next one starts."""
    with contextlib.ExitStack() as stack:
        current: str | None = None
        update: Any = None

        def on_progress(description: str, done: int, total: int | None) -> None:
            nonlocal current, update
            if description != current:
                stack.close()
                current, update = description, stack.enter_context(output.progress(description, total, format_size))
            update(done)

        yield on_progress


def json_document(conversion: "Conversion", files: list["WrittenFile"]) -> dict[str, Any]:
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
