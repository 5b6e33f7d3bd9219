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
PRECISION_HELP = "bf16x3: between bf16 and fp32, requires AMX. tf32: GPUs only."
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|fp32|bf16|bf16x3|tf32",
        help=f"Precision of the matrix multiplications. auto: fp32. {PRECISION_HELP}",
    ),
]
TrainPrecision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="auto|fp32|bf16|bf16x3|tf32",
        help="Precision of the matrix multiplications. auto: bf16 if the processor (AMX) or the GPU multiplies bf16 "
        f"natively, otherwise fp32. {PRECISION_HELP}",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        envvar="LLMC_THREADS",
        show_default="the cores this process may use",
        help="Number of CPU threads.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON to stdout.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON document per line to stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-Q", help="Print only errors to stderr; stdout is not affected.")]
