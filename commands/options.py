"""Options shared by several commands."""

from typing import Annotated

import typer

Device = Annotated[
    str,
    typer.Option(
        "--device",
        envvar="LLMC_DEVICE",
        metavar="auto|cpu|cuda|cuda:N",
        help="Device to run on; auto uses a CUDA GPU if one is available.",
    ),
]
Precision = Annotated[
    str,
    typer.Option("--precision", metavar="auto|fp32|bf16|bf16x3|tf32", help="Precision of the matrix multiplications."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        envvar="LLMC_THREADS",
        show_default="the cores this process may use",
        help="Number of CPU threads.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON to stdout: one document, or one line per event of a stream.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-Q", help="Print nothing but errors to stderr.")]
