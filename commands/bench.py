"""``llmc bench``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmc_cli.commands import options, render
from llmc_cli.errors import CheckError, UsageError

if TYPE_CHECKING:
    from llmc_cli.benchmark.benchmark import Benchmark
    from llmc_cli.benchmark.results import Row


def bench(
    section: Annotated[
        Literal["kernels", "train", "sample", "prepro", "start"] | None,
        typer.Argument(metavar="[kernels|train|sample|prepro|start]", help="What to measure; without it, everything."),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", help="d6 … d84, gpt2:dN, gpt3:cN, or a model file, of which the shape counts."),
    ] = "d12",
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", min=1, show_default="4; sample: 1", help="Sequences side by side.")
    ] = None,
    seq_len: Annotated[
        int, typer.Option("--seq-len", "-t", min=1, help="Positions of each; in sample, those already there.")
    ] = 64,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            show_default="kernels 20, train 10, sample 10, prepro and start 3; fewer where they are long",
            help="Timed runs of each row.",
        ),
    ] = None,
    recompute: Annotated[
        int, typer.Option("--recompute", "-r", min=0, max=2, help="In training: what train takes it for.")
    ] = 2,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            "--peak-tflops",
            show_default="the fastest product measured",
            help="The device's published TFLOP/s in this precision, to count MFU by.",
        ),
    ] = None,
    against: Annotated[
        Literal["torch"] | None,
        typer.Option("--against", metavar="torch", help="Let PyTorch do the same work, in turns, and print the ratio."),
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Keep the results, as JSON; - is as --json.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="FILE", help="Compare with saved results (- is stdin); exit 1 where slower."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="How much slower --baseline lets pass, as a fraction.")
    ] = 0.1,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg|png", help="Draw the results as a bar chart.")
    ] = None,
    device: options.Device = "auto",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="auto|fp32|bf16|bf16x3|tf32|int8",
            help="What the matrices are multiplied in; int8 in sample only.",
        ),
    ] = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure this machine's ceilings, and how near to them each part of the program comes.

    Times are medians, with the best beside them. A row's share is of what bounds it: the fastest matrix product or the
    fastest memory traffic measured here; more than 100% of memory means that the data stays in the caches. Of a
    training step the share is its MFU, by the fastest product or by --peak-tflops; of prepro what the tokenizer alone
    takes. Each side of a comparison works in a process of its own, one at a time; the ratio is PyTorch's time divided
    by ours, so above 1 we are faster. With --precision bf16 PyTorch trains under autocast. start measures train from
    the start of its process to its first step, with compiled kernels in the cache and without. --baseline judges whole
    rows, not the parts of a step. On CUDA memory is the device's, and a step's launches are counted.
    """
    from llmc_cli.benchmark import benchmark, chart
    from llmc_cli.benchmark.baseline import file_name

    if save == Path("-"):
        json, save = True, None
    output = render.Output(json, quiet)
    if plot:
        chart.require_chart(plot)
        if section == "start":
            raise UsageError("--plot: start has no shares of a ceiling to draw")
    asked = benchmark.BenchOptions(
        sections=(section,) if section else benchmark.SECTIONS,
        model=model,
        batch=batch,
        seq_len=seq_len,
        steps=steps,
        against_torch=against == "torch",
        baseline=baseline,
        device=device,
        precision=precision,
        threads=threads,
        recompute=recompute,
        peak_tflops=peak_tflops,
    )
    benchmark = benchmark.run(asked, output.info)
    if save:
        benchmark.save(save)
    if plot:
        chart.draw(benchmark, plot)
    if json:
        output.print_json(benchmark.document())
    else:
        show(output, benchmark)
    slower = [change for change in benchmark.changes if change.slowdown > tolerance]
    if baseline and slower:
        raise CheckError(
            f"slower than {file_name(baseline)} by more than {tolerance:.0%}: "
            + ", ".join(f"{change.name} (+{change.slowdown:.0%})" for change in slower)
        )


def show(output: render.Output, benchmark: "Benchmark") -> None:
    """The results as tables, and with PyTorch the ratios as lines below."""
    ceilings = benchmark.ceilings
    rows = [(f"matmul {shape}", f"{flops / 1e9:.1f} GFLOP/s") for shape, flops in ceilings.matmul.items()]
    rows += [(f"memory {kind}", f"{rate / 1e9:.1f} GB/s") for kind, rate in ceilings.memory.items()]
    if benchmark.compile_seconds is not None:
        rows.append(("kernels compiled in", render.format_duration(benchmark.compile_seconds)))
    title = benchmark.machine.get("card", benchmark.machine["processor"])
    output.print_table(("ceiling", ceilings.precision), rows, title=str(title))

    modes = list(dict.fromkeys(mode for row in benchmark.rows for mode in row.torch))
    columns = ["row", "ms", "best", "runs", "rate", "share", "of"]
    for mode in modes:
        columns += [f"{mode} ms", "ratio"]
    output.print_table(columns, [cells(row, modes) for row in benchmark.rows])

    if benchmark.sides:
        output.print_table(
            ("process", "peak memory", "configuration"),
            [
                (
                    f"{side.section}: {side.side}",
                    "unknown" if side.peak_memory is None else render.format_size(side.peak_memory),
                    ", ".join(f"{key} {value}" for key, value in side.configuration.items()),
                )
                for side in benchmark.sides
            ],
        )
    for row in benchmark.rows:
        if row.launches and not row.calls:
            output.print_line(f"{row.name}: {row.launches} launches, of kernels, matrix products and graphs of both")
    for section, (ours, theirs) in benchmark.other_precisions.items():
        output.print_line(f"{section}: llmc in {ours}, PyTorch in {theirs}")
    for section, absent in benchmark.absent.items():
        for mode, why in absent.items():
            output.print_line(f"{section}: without {mode}: {why}")
    if benchmark.changes:
        output.print_table(
            ("row", "before, ms", "now, ms", "change"),
            [
                (change.name, milliseconds(change.before), milliseconds(change.now), f"{change.slowdown:+.1%}")
                for change in benchmark.changes
            ],
        )
    for row in benchmark.rows:
        if row.torch and not row.name.startswith("kernels/"):
            output.print_line(verdict(row))


def cells(row: "Row", modes: list[str]) -> list[str]:
    """A row of the table; what does not apply is empty."""
    found = [
        f"{row.name} ×{row.calls}" if row.calls else row.name,
        milliseconds(row.seconds),
        milliseconds(row.best),
        str(row.runs),
        rate(row),
        f"{row.share:.0%}" if row.ceiling else "",
        row.ceiling,
    ]
    for mode in modes:
        found += [milliseconds(row.torch[mode]), f"{row.ratios[mode]:.2f}"] if mode in row.torch else ["", ""]
    return found


def rate(row: "Row") -> str:
    """In the unit of what bounds the row; tokens where they are counted."""
    if row.name.startswith("prepro/"):
        return f"{row.bytes_per_s / 1e6:.2f} MB/s, {row.tokens_per_s:,.0f} tok/s"
    if row.tokens_per_s:
        return f"{row.tokens_per_s:,.1f} tok/s"
    if row.ceiling == "matmul":
        return f"{row.flops_per_s / 1e9:.1f} GFLOP/s"
    return f"{row.bytes_per_s / 1e9:.1f} GB/s" if row.ceiling else ""


def milliseconds(value: float) -> str:
    return f"{1000 * value:.3f}" if value < 0.1 else f"{1000 * value:.1f}"


def verdict(row: "Row") -> str:
    """``train/step: ratio 1.04 (torch compiled 1030.0 ms / llmc 990.0 ms, medians of 10 runs in turns)``."""
    mode = row.best_mode
    return (
        f"{row.name}: ratio {row.ratios[mode]:.2f} ({mode} {milliseconds(row.torch[mode])} ms / llmc "
        f"{milliseconds(row.seconds)} ms, medians of {row.runs} runs in turns)"
    )
