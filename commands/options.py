"""The options that several commands share, and what they become."""

from typing import Annotated

import typer

Device = Annotated[
    str, typer.Option("--device", envvar="LLMC_DEVICE", metavar="auto|cpu|cuda|cuda:N", help="Where to compute.")
]
Precision = Annotated[
    str, typer.Option("--precision", metavar="auto|fp32|bf16|bf16x3|tf32", help="What the matrices are multiplied in.")
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        envvar="LLMC_THREADS",
        show_default="the cores this process may use",
        help="CPU threads.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout: one document, or a line per event of a stream.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-Q", help="Nothing on stderr but errors.")]
