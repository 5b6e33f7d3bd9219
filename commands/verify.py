"""``llmc verify``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc_cli.commands import options, render
from llmc_cli.errors import CheckError, DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmc_cli.kernels.backend import Backend
    from llmc_cli.verification.comparison import Check

CHECK_COLUMNS = "name", "what", "largest", "max error", "mean error", "bound", "ok"
FILE_COLUMNS = "file", "kind", "version", "content", "ok"


def verify(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FILE",
            help="Files and folders to check; with --state, the model. Without FILE, the kernels are checked.",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="DEBUG_STATE",
            help="Debug state: a batch with the logits, loss and gradients expected from the model.",
        ),
    ] = None,
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            metavar="N",
            min=0,
            help="With --state: number of AdamW steps to check, all on the debug state's batch.",
        ),
    ] = 10,
    losses: Annotated[
        str | None,
        typer.Option(
            "--losses",
            metavar="FILE",
            help="Expected losses of the AdamW steps, one per line (- for stdin).",
            show_default="computed by the float64 reference",
        ),
    ] = None,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check the compute kernels, check files, or compare a model with recorded results.

    Without FILE, check every kernel against a float64 reference, and train a tiny model. With files, identify each
    file and check that it is complete and valid; if one of them is a model, check the token ids and sizes of the others
    against it. With --state, compare a model with a debug state, which is a batch with reference logits, loss and
    gradients, and check the losses of training steps on this batch.

    The exit status is 1 if a check failed and 3 if a file is invalid.
    """
    output = render.Output(json, quiet)
    if state is None and losses is not None:
        raise UsageError("--losses needs --state, which is missing")
    if state is not None:
        if not files or len(files) != 1:
            raise UsageError(f"--state needs exactly one FILE, the model; found {len(files or [])}")
        verify_state(output, files[0], state, steps, losses, (device, precision, threads))
    elif files:
        verify_files(output, files)
    else:
        verify_kernels(output, (device, precision, threads))


def verify_kernels(output: render.Output, backend_options: tuple[str, str, int | None]) -> None:
    from llmc_cli.kernels.backend import open_kernels
    from llmc_cli.verification.kernel_checks import check_kernels, kernel_check_count

    backend = open_kernels(*backend_options, output.info)
    run_checks(output, backend, check_kernels(backend.kernels, backend.precision), kernel_check_count(), {})


def verify_state(
    output: render.Output,
    model: Path,
    state: Path,
    steps: int,
    losses: str | None,
    backend_options: tuple[str, str, int | None],
) -> None:
    import sys

    from llmc_cli.kernels.backend import open_kernels
    from llmc_cli.verification.model_checks import check_state, parse_losses, state_check_count

    expected = None
    if losses is not None:
        content = sys.stdin.buffer.read() if losses == "-" else Path(losses).read_bytes()
        expected = parse_losses(content.decode("utf-8", "replace"), "stdin" if losses == "-" else losses, steps)
    backend = open_kernels(*backend_options, output.info)
    checks = check_state(model, state, backend.kernels, steps, expected, backend.precision)
    run_checks(output, backend, checks, state_check_count(steps), {"model": str(model), "state": str(state)})


def run_checks(
    output: render.Output, backend: "Backend", checks: "Iterator[Check]", total: int, inputs: dict[str, str]
) -> None:
    """Run the checks and print the environment and the results. Raise CheckError if a check failed."""
    import dataclasses

    from llmc_cli.verification.kernel_checks import versions

    environment = {
        **inputs,
        "device": backend.device,
        "precision": backend.precision,
        "threads": str(backend.threads),
        "runs on": backend.description,
        **versions(),
    }
    if not output.json:
        output.print_table(("environment", "value"), list(environment.items()))
    done: list[Check] = []
    with output.progress("checks", total, lambda count: f"{count:.0f}") as update:
        for check in checks:
            done.append(check)
            update(len(done))
    failed = [check for check in done if not check.ok]
    if output.json:
        rows = [{**dataclasses.asdict(check), "ok": check.ok} for check in done]
        output.print_json({"environment": environment, "checks": rows, "okay": not failed})
    else:
        output.print_table(CHECK_COLUMNS, [check_row(check) for check in done])
        output.print_line(f"overall okay: {int(not failed)}")
    if failed:
        names = ", ".join(dict.fromkeys(f"{check.name} {check.what}".strip() for check in failed[:5]))
        more = f" and {len(failed) - 5} more" if len(failed) > 5 else ""
        raise CheckError(f"{len(failed)} of {len(done)} checks failed: {names}{more}")


def check_row(check: "Check") -> list[str]:
    numbers = check.largest, check.max_error, check.mean_error, check.bound
    return [check.name, check.what, *(f"{number:.2e}" for number in numbers), str(int(check.ok))]


def verify_files(output: render.Output, paths: list[Path]) -> None:
    import dataclasses

    from llmc_cli.verification.file_checks import check_files

    reports = []
    with output.progress("verifying", None, lambda count: f"{count:.0f} files", terminal_only=True) as update:
        for report in check_files(paths):
            reports.append(report)
            update(len(reports))
    errors = [report.error for report in reports if report.error is not None]
    if output.json:
        output.print_json({"files": [dataclasses.asdict(report) for report in reports], "okay": not errors})
    else:
        rows = [
            [
                report.path,
                report.kind or "",
                "" if report.version is None else str(report.version),
                ", ".join(f"{name} {format_fact(value)}" for name, value in report.facts.items()),
                str(int(report.error is None)),
            ]
            for report in reports
        ]
        output.print_table(FILE_COLUMNS, rows)
    if errors:
        raise DataError("\nllmc: ".join(errors))


def format_fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6f}" if isinstance(value, float) else str(value)
