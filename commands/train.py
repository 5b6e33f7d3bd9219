"""``llmc train``."""

import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc_cli.commands import options, render
from llmc_cli.commands.declared_options import with_options
from llmc_cli.training.options import MODEL, CompatibilityOptions, TrainOptions

if TYPE_CHECKING:
    from llmc_cli.kernels.backend import Backend
    from llmc_cli.tokenizer.base import Tokenizer
    from llmc_cli.training.plan import Plan
    from llmc_cli.training.reports import Report, StepReport


@with_options(TrainOptions, CompatibilityOptions)
def train(
    train_options: TrainOptions,
    compatibility: CompatibilityOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", rich_help_panel=MODEL, help="Print the plan (memory, time) and exit.")
    ] = False,
    device: options.Device = "auto",
    precision: options.TrainPrecision = "auto",
    threads: options.Threads = None,
    json: options.JsonLines = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a model from scratch or from a model file, with checkpoints that llm.c can resume from.

    By default, train a 6-layer GPT-2 on the files that `llmc prepro tinyshakespeare` writes. One line per step goes to
    stdout. Ctrl-C finishes the current step and saves a checkpoint if --out is given; a second Ctrl-C exits at once.
    """
    from llmc_cli.kernels.backend import open_kernels
    from llmc_cli.training.plan import make_plan

    if compatibility.tf32 and precision in ("auto", "fp32"):
        precision = "tf32"
    output = render.Output(json, quiet)
    backend = open_kernels(device, precision, threads, output.info, training=True)
    plan = make_plan(train_options, backend)
    show_plan(output, plan, backend, dry_run)
    if dry_run:
        return
    if train_options.out is None:
        output.warning("without --out, no checkpoint or log of this run is saved")
    run_training(output, plan, backend)


def show_plan(output: render.Output, plan: "Plan", backend: "Backend", dry_run: bool) -> None:
    """Print the plan: on stdout for a dry run, else on stderr, as one line unless it is a terminal."""
    import sys

    settings = plan.options
    if not dry_run and not sys.stderr.isatty():
        output.info(
            f"{settings.model}: {plan.parameters:,} parameters, {plan.steps - plan.first_step:,} steps of "
            f"{plan.tokens_per_step:,} tokens, {render.format_size(plan.total_memory)}, {backend.description}"
        )
        return
    if dry_run and output.json:
        output.print_json(
            {
                "model": settings.model, "parameters": plan.parameters, "device": backend.device,
                "precision": backend.precision, "threads": backend.threads, "batch": settings.batch,
                "seq_len": settings.seq_len, "accumulation": plan.accumulation, "first_step": plan.first_step,
                "steps": plan.steps, "train_tokens": plan.train_tokens, "val_tokens": plan.val_tokens,
                "flops_per_token": plan.flops_per_token, "memory": plan.memory, "total_memory": plan.total_memory,
                "peak_flops": plan.peak_flops, "expected_seconds": plan.expected_seconds,
            }
        )  # fmt: skip
        return
    c = plan.config
    batch = f"{settings.batch} x {settings.seq_len} x {plan.accumulation}"
    rows = [
        ("model", f"{settings.model}: {c.num_layers} layers, {c.channels} channels, {c.num_heads} heads"),
        ("parameters", f"{plan.parameters:,}"),
        ("device", backend.description),
        ("precision", backend.precision + (f" ({backend.reason})" if backend.reason else "")),
        ("data", f"{plan.train_tokens:,} training tokens, {plan.val_tokens:,} validation tokens"),
        ("batch", f"{batch} = {plan.tokens_per_step:,} tokens per step"),
        ("steps", f"{plan.steps:,}" + (f", resuming at {plan.first_step:,}" if plan.first_step else "")),
        ("FLOPs per token", f"{plan.flops_per_token:,}"),
        *((f"memory: {use}", render.format_size(count)) for use, count in plan.memory.items()),
        ("memory: total", render.format_size(plan.total_memory)),
        ("expected time", f"{render.format_duration(plan.expected_seconds)} without validation and samples"),
    ]
    output.print_table(("plan", "value"), rows, result=dry_run)


def run_training(output: render.Output, plan: "Plan", backend: "Backend") -> None:
    """Train and print the reports. SIGINT, SIGTERM and SIGHUP end the run after the current step."""
    import sys

    from llmc_cli.training.reports import StepReport
    from llmc_cli.training.trainer import Trainer

    received: list[int] = []
    broken: list[BrokenPipeError] = []

    def on_signal(signum: int, frame: Any) -> None:
        if received:
            raise SystemExit(128 + signum)
        received.append(signum)
        output.info("finishing the current step; a second signal exits at once")

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup ignores it
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, on_signal)

    rate = 0.0

    def amount(done: float) -> str:
        return f"{int(done)}/{plan.steps}  {rate:,.0f} tok/s"

    printer = ReportPrinter(output, plan)
    trainer = Trainer(plan, backend)
    with output.progress("training", plan.steps, amount, terminal_only=True) as on_progress:
        for report in trainer.run(should_stop=lambda: bool(received or broken)):
            try:
                printer.show(report)
            except BrokenPipeError as error:  # the reader has exited: save a checkpoint, as on an interrupt
                broken.append(error)
            if isinstance(report, StepReport):
                rate = report.tokens_per_s
                on_progress(report.step)
    if broken:
        raise broken[0]
    if plan.first_step >= plan.steps:
        output.info(f"nothing to do: {plan.options.out} already holds step {plan.first_step} of {plan.steps}")
    if received:
        sys.stdout.flush()
        raise SystemExit(128 + received[0])


class ReportPrinter:
    """Prints the reports of a run: a table on a terminal, plain lines in a pipe, or JSON Lines."""

    def __init__(self, output: render.Output, plan: "Plan") -> None:
        import sys

        self.output, self.vocab_size = output, plan.config.vocab_size
        self.aligned = sys.stdout.isatty() and not output.json
        self.tokenizer: Tokenizer | None = None
        self.has_heading = False

    def show(self, report: "Report") -> None:
        from llmc_cli.training.reports import CheckpointReport, SampleReport, StepReport, ValidationReport

        if self.output.json:
            self.output.print_json(report.metrics())
        elif isinstance(report, StepReport):
            self.output.print_line(self.row(report) if self.aligned else step_line(report))
            if report.skipped:
                self.output.warning(f"step {report.step}: update skipped: {report.skipped}")
        elif isinstance(report, ValidationReport):
            self.output.print_line(f"val loss {report.val_loss:.6f}")
        elif isinstance(report, SampleReport):
            self.output.print_line(self.sample(report.ids))
        elif isinstance(report, CheckpointReport):
            self.output.info(f"step {report.step}: saved {report.path}")

    def row(self, report: "StepReport") -> str:
        heading = ""
        if not self.has_heading:
            self.has_heading = True
            heading = f"{'step':>11}  {'loss':>9}  {'norm':>9}  {'lr':>8}  {'ms':>9}  {'tok/s':>8}   MFU\n"
        step = f"{report.step}/{report.steps}"
        return heading + (
            f"{step:>11}  {report.loss:9.6f}  {report.norm:9.4f}  {report.lr:8.2e}  {report.ms:9.1f}  "
            f"{report.tokens_per_s:8.0f}  {report.mfu:4.0%}"
        )

    def sample(self, ids: list[int]) -> str:
        """Return the text if the vocabulary is GPT-2's, else the ids."""
        from llmc_cli.models.presets import GPT2_VOCAB_SIZE

        if self.vocab_size != GPT2_VOCAB_SIZE:
            return "generating:\n---\n" + " ".join(map(str, ids)) + "\n---"
        if self.tokenizer is None:
            from llmc_cli.tokenizer.tokenizer import load_tokenizer

            self.tokenizer = load_tokenizer("gpt2")
        return "generating:\n---\n" + self.tokenizer.decode_bytes(ids).decode("utf-8", "replace") + "\n---"


def step_line(report: "StepReport") -> str:
    """Return the line of a step in a pipe. Scripts rely on this format."""
    return (
        f"step {report.step}/{report.steps} | loss {report.loss:.6f} | norm {report.norm:.4f} | lr {report.lr:.2e} | "
        f"{report.ms:.1f} ms | {report.tokens_per_s:.0f} tok/s | {report.mfu:.0%} MFU"
    )
