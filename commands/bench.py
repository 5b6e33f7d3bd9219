"""The ``bench`` command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmc_cli.commands import options, render
from llmc_cli.errors import CheckError, UsageError
from llmc_cli.models.preset_shapes import PRESETS_HELP

if TYPE_CHECKING:
    from llmc_cli.benchmark.benchmark import Benchmark
    from llmc_cli.benchmark.results import Row


def bench(
    section: Annotated[
        Literal["kernels", "train", "sample", "prepro", "start"] | None,
        typer.Argument(
            metavar="SECTION", help="Section to measure: kernels, train, sample, prepro or start. Without it, all."
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            help="Model file or Hugging Face config.json (only the configuration is used), or a preset: "
            f"{PRESETS_HELP}.",
        ),
    ] = "d12",
    batch: Annotated[
        int | None, typer.Option("--batch", "-b", metavar="N", min=1, show_default="4; sample: 1", help="Batch size.")
    ] = None,
    seq_len: Annotated[
        int,
        typer.Option(
            "--seq-len", "-t", metavar="N", min=1, help="Sequence length; for sample, tokens already in the KV cache."
        ),
    ] = 64,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=1,
            show_default="kernels 20, train 10, sample 10, prepro and start 3; fewer if a row would take over 2 min",
            help="Number of timed runs per row.",
        ),
    ] = None,
    recompute: Annotated[
        int,
        typer.Option(
            "--recompute", "-r", metavar="N", min=0, max=2, help="Recomputation level, as in `llmc train --recompute`."
        ),
    ] = 2,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            "--peak-tflops",
            show_default="the fastest matrix product measured",
            help="Peak of the device in this precision, in TFLOP/s, for the MFU.",
        ),
    ] = None,
    against: Annotated[
        Literal["torch"] | None,
        typer.Option(
            "--against",
            metavar="torch",
            help="Also run PyTorch on the same work, alternating with llmc, and print the ratios.",
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Save the results as JSON; - is the same as --json.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline", metavar="FILE", help="Compare with saved results (- for stdin); exit with status 1 if slower."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", min=0, help="Slowdown that --baseline tolerates, as a fraction.")
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
            help="Precision of the matrix multiplications. auto: as in `llmc train`; for sample, all in turn. "
            f"{options.PRECISION_HELP} int8: sample only.",
        ),
    ] = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure the speed of llmc relative to what this machine can do.

    The ceilings are measured first: the peak FLOP/s of matrix products and the memory bandwidth. Each row shows the
    median and best time, and the percentage of the limiting ceiling that was reached. More than 100% of the memory
    bandwidth means that the data was in the cache. For a training step the percentage is the MFU, relative to the
    fastest matrix product or to --peak-tflops; for prepro it is the tokenizer's share of the time.

    With --against torch, each implementation runs in its own process, one at a time. The ratio is PyTorch's time
    divided by llmc's: above 1 llmc is faster. With --precision bf16 PyTorch trains under autocast.

    The start section measures the time until llmc train has finished its first step, with cached kernels and with an
    empty kernel cache. --baseline compares the times of whole rows, not of the operations within a training step. On a
    GPU, the memory shown is GPU memory, and the number of kernel launches per step is shown, too.
    """
    from llmc_cli.benchmark import chart
    from llmc_cli.benchmark.baseline import file_name
    from llmc_cli.benchmark.benchmark import SECTIONS, BenchOptions, run_benchmark

    if save == Path("-"):
        json, save = True, None
    output = render.Output(json, quiet)
    if plot:
        chart.require_chart(plot)
        if section == "start":
            raise UsageError("--plot: the start section has no ceiling to plot against")
    bench_options = BenchOptions(
        sections=(section,) if section else SECTIONS,
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
    benchmark = run_benchmark(bench_options, output.info)
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
    """Print the results as tables, followed by notes and the ratios to PyTorch."""
    ceilings = benchmark.ceilings
    rows = [(f"matmul {shape}", f"{flops / 1e9:.1f} GFLOP/s") for shape, flops in ceilings.matmul.items()]
    rows += [(f"memory {kind}", f"{rate / 1e9:.1f} GB/s") for kind, rate in ceilings.memory.items()]
    if benchmark.compile_seconds is not None:
        rows.append(("kernel compilation", render.format_duration(benchmark.compile_seconds)))
    title = benchmark.machine.get("card", benchmark.machine["processor"])
    output.print_table(("ceiling", ceilings.precision), rows, title=str(title))

    modes = list(dict.fromkeys(mode for row in benchmark.rows for mode in row.torch))
    columns = ["row", "ms", "best", "runs", "rate", "share", "of"]
    for mode in modes:
        columns += [f"{mode} ms", "ratio"]
    output.print_table(columns, [cells(row, modes) for row in benchmark.rows])

    if benchmark.workers:
        output.print_table(
            ("process", "peak memory", "configuration"),
            [
                (
                    f"{worker.section}: {worker.implementation}",
                    "unknown" if worker.peak_memory is None else render.format_size(worker.peak_memory),
                    ", ".join(f"{key} {value}" for key, value in worker.configuration.items()),
                )
                for worker in benchmark.workers
            ],
        )
    for row in benchmark.rows:
        if row.launches and not row.calls:
            output.print_line(f"{row.name}: {row.launches} launches of kernels, matrix products and CUDA graphs")
    for section, (llmc, torch) in benchmark.precision_differences.items():
        output.print_line(f"{section}: llmc in {llmc}, PyTorch in {torch}")
    for section, modes_unavailable in benchmark.unavailable.items():
        for mode, reason in modes_unavailable.items():
            output.print_line(f"{section}: {mode} not available: {reason}")
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
            output.print_line(ratio_line(row))


def cells(row: "Row", modes: list[str]) -> list[str]:
    """Return the cells of a row; values that do not apply are empty."""
    values = [
        f"{row.name} ×{row.calls}" if row.calls else row.name,
        milliseconds(row.seconds),
        milliseconds(row.best),
        str(row.runs),
        rate(row),
        f"{row.share:.0%}" if row.ceiling else "",
        row.ceiling,
    ]
    for mode in modes:
        values += [milliseconds(row.torch[mode]), f"{row.ratios[mode]:.2f}"] if mode in row.torch else ["", ""]
    return values


def rate(row: "Row") -> str:
    """Format tokens/s if the row counts tokens, else the rate that its ceiling limits."""
    if row.name.startswith("prepro/"):
        return f"{row.bytes_per_s / 1e6:.2f} MB/s, {row.tokens_per_s:,.0f} tok/s"
    if row.tokens_per_s:
        return f"{row.tokens_per_s:,.1f} tok/s"
    if row.ceiling == "matmul":
        return f"{row.flops_per_s / 1e9:.1f} GFLOP/s"
    return f"{row.bytes_per_s / 1e9:.1f} GB/s" if row.ceiling else ""


def milliseconds(value: float) -> str:
    return f"{1000 * value:.3f}" if value < 0.1 else f"{1000 * value:.1f}"


def ratio_line(row: "Row") -> str:
    """Return ``train/step: ratio 1.04 (torch compiled 1030.0 ms / llmc 990.0 ms, medians of 10 interleaved runs)``."""
    mode = row.best_mode
    return (
        f"{row.name}: ratio {row.ratios[mode]:.2f} ({mode} {milliseconds(row.torch[mode])} ms / llmc "
        f"{milliseconds(row.seconds)} ms, medians of {row.runs} interleaved runs)"
    )
