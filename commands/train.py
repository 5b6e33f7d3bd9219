"""``llmc train``."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmc_cli.commands import options, render
from llmc_cli.errors import MissingError

if TYPE_CHECKING:
    from llmc_cli.kernels.backend import Backend
    from llmc_cli.tokenizer.base import Tokenizer
    from llmc_cli.training.plan import Plan
    from llmc_cli.training.reports import Report, StepReport
    from llmc_cli.training.trainer import Training

DATA = "data/tinyshakespeare/tiny_shakespeare_{}.bin"

FLAG = "0|1"  # what the C trainer writes for no and yes

MODEL, DATA_PANEL, LENGTH, RATE, WATCH, OPTIMIZER, LATER = (
    "Model and output", "Data", "Batch and length", "Learning rate", "Evaluation", "Optimizer", "Of the C trainer"
)  # fmt: skip


def option(panel: str, names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names.split(), rich_help_panel=panel, help=text, **more)


def train(
    model: Annotated[
        str, option(MODEL, "--model -e", "A model file, d6 … d84, gpt2:dN, gpt3:cN, or a Hugging Face config.json.")
    ] = "d6",
    out: Annotated[
        Path | None, option(MODEL, "--out -o", "Folder for checkpoints and logs; without it nothing is kept.")
    ] = None,
    checkpoint_every: Annotated[int, option(MODEL, "--checkpoint-every -n", "Steps between checkpoints.", min=0)] = 0,
    keep: Annotated[int, option(MODEL, "--keep -nk", "Checkpoints to keep; 0 keeps all.", min=0)] = 0,
    major_every: Annotated[
        int, option(MODEL, "--major-every -nm", "Checkpoints at multiples of this are never deleted.", min=0)
    ] = 0,
    resume: Annotated[
        int, option(MODEL, "--resume -y", "1: go on from the last checkpoint in --out.", metavar=FLAG, min=0, max=1)
    ] = 0,
    force: Annotated[bool, option(MODEL, "--force", "Resume with arguments that change the course.")] = False,
    data: Annotated[
        str, option(DATA_PANEL, "--data -i", "Training shards, a glob.", show_default="as prepro names them")
    ] = DATA.format("train"),
    val_data: Annotated[
        str, option(DATA_PANEL, "--val-data -j", "Validation shards, a glob.", show_default="as prepro names them")
    ] = DATA.format("val"),
    shuffle: Annotated[
        bool, option(DATA_PANEL, "--shuffle/--no-shuffle", "Shuffle shards and the samples in them.")
    ] = True,
    seed: Annotated[int, option(DATA_PANEL, "--seed", "Of fresh weights and shuffling.", min=0, max=2**32 - 1)] = 42,
    overfit: Annotated[
        int,
        option(DATA_PANEL, "--overfit -a", "1: train on the first validation batch only.", metavar=FLAG, min=0, max=1),
    ] = 0,
    batch: Annotated[int, option(LENGTH, "--batch -b", "Sequences per micro-step.", min=1)] = 4,
    seq_len: Annotated[int, option(LENGTH, "--seq-len -t", "Positions per sequence.", min=1)] = 1024,
    total_batch: Annotated[
        int, option(LENGTH, "--total-batch -d", "Tokens per update, a multiple of b·t; -1: b·t.", min=-1)
    ] = -1,
    steps: Annotated[int, option(LENGTH, "--steps -x", "Updates; -1: one epoch.", min=-1)] = -1,
    recompute: Annotated[
        int,
        option(
            LENGTH,
            "--recompute -r",
            "Compute again in the backward pass instead of keeping: 0 nothing, 1 GELU, 2 GELU and layernorm.",
            min=0,
            max=2,
        ),
    ] = 2,
    schedule: Annotated[str, option(RATE, "--schedule -k", "cosine, linear, constant or wsd.")] = "cosine",
    lr: Annotated[float, option(RATE, "--lr -l", "The highest learning rate.")] = 3e-4,
    warmup: Annotated[int, option(RATE, "--warmup -u", "Steps of linear warm-up.", min=0)] = 0,
    lr_final: Annotated[float, option(RATE, "--lr-final -q", "The last learning rate, as a fraction.")] = 1.0,
    weight_decay: Annotated[float, option(OPTIMIZER, "--weight-decay -c", "On matrices and embeddings.")] = 0.0,
    beta1: Annotated[float, option(OPTIMIZER, "--beta1", "AdamW's first moment.")] = 0.9,
    beta2: Annotated[float, option(OPTIMIZER, "--beta2", "AdamW's second moment.")] = 0.95,
    eps: Annotated[float, option(OPTIMIZER, "--eps", "AdamW's epsilon.")] = 1e-8,
    clip: Annotated[float, option(OPTIMIZER, "--clip", "Largest norm of the gradients; 0: no clipping.", min=0)] = 1.0,
    skip_loss_z: Annotated[
        float,
        option(OPTIMIZER, "--skip-loss-z -sl", "Skip updates whose loss lies this many deviations out; 0: never."),
    ] = 0.0,
    skip_grad_z: Annotated[float, option(OPTIMIZER, "--skip-grad-z -sg", "The same for the gradient norm.")] = 0.0,
    val_every: Annotated[int, option(WATCH, "--val-every -v", "Steps between validations; 0: never.", min=0)] = 20,
    val_steps: Annotated[int, option(WATCH, "--val-steps -m", "Batches of each; -1: all.", min=-1)] = 20,
    sample_every: Annotated[int, option(WATCH, "--sample-every -s", "Steps between samples; 0: never.", min=0)] = 20,
    sample_tokens: Annotated[int, option(WATCH, "--sample-tokens -g", "Length of a sample.", min=1)] = 64,
    dry_run: Annotated[bool, option(WATCH, "--dry-run", "Print what the run will take, and stop.")] = False,
    hellaswag: Annotated[
        int, option(LATER, "--hellaswag -h", "HellaSwag evaluation: not yet.", metavar=FLAG, min=0, max=1)
    ] = 0,
    zero: Annotated[
        int, option(LATER, "--zero -z", "ZeRO stage: 0 and 1 are the same on one process.", min=0, max=3)
    ] = 0,
    tf32: Annotated[
        int | None,
        option(LATER, "--tf32 -f", "1: --precision tf32 in place of fp32, on a GPU.", metavar=FLAG, min=0, max=1),
    ] = None,
    master_weights: Annotated[
        int,
        option(
            LATER,
            "--master-weights -w",
            "1: training states hold the weights in float32, as the C trainer wants them by default.",
            metavar=FLAG,
            min=0,
            max=1,
        ),
    ] = 1,
    gelu_fusion: Annotated[
        int, option(LATER, "--gelu-fusion -ge", "Accepted; the CPU always fuses it.", min=-1, max=2)
    ] = -1,
    log_gpu_every: Annotated[
        int, option(LATER, "--log-gpu-every -lg", "Accepted; there is no GPU to log.", min=-1)
    ] = -1,
    num_processes: Annotated[int, option(LATER, "--num-processes -pn", "More than 1: not yet.", min=1)] = 1,
    process_rank: Annotated[int, option(LATER, "--process-rank -pr", "This process's rank.", min=0)] = 0,
    gpus_per_node: Annotated[int, option(LATER, "--gpus-per-node -pg", "Accepted.", min=1)] = 8,
    init_method: Annotated[str, option(LATER, "--init-method -pi", "mpi, tcp or fs.")] = "mpi",
    server_ip: Annotated[str, option(LATER, "--server-ip -ps", "For tcp.")] = "",
    fs_path: Annotated[str, option(LATER, "--fs-path -pf", "For fs.")] = "",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    threads: options.Threads = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a model, fresh or from a file, and keep checkpoints that the C trainer can go on with.

    Without options it trains a 6-layer GPT-2 on what `llmc prepro tinyshakespeare` made. One line per step goes to
    stdout. Ctrl-C finishes the step and saves where --out is given; a second one stops at once.
    """
    if hellaswag:
        raise MissingError("--hellaswag 1: not yet; HellaSwag evaluation comes with a later version")
    if num_processes > 1 or process_rank > 0:
        raise MissingError("--num-processes, --process-rank: training in several processes is not there yet")
    if zero > 1:
        raise MissingError(f"--zero {zero}: stages 2 and 3 are not there yet")
    if tf32 == 1 and precision in ("auto", "fp32"):
        precision = "tf32"

    from llmc_cli.kernels.backend import open_kernels
    from llmc_cli.training.options import TrainOptions
    from llmc_cli.training.trainer import Training

    output = render.Output(json, quiet)
    backend = open_kernels(device, precision, threads, output.info, training=True)
    training = Training(
        TrainOptions(
            model=model, data=data, val_data=val_data, out=out, checkpoint_every=checkpoint_every, keep=keep,
            major_every=major_every, resume=resume == 1, force=force, batch=batch, seq_len=seq_len,
            total_batch=None if total_batch == -1 else total_batch, steps=None if steps == -1 else steps,
            schedule=schedule, lr=lr, warmup=warmup, lr_final=lr_final, weight_decay=weight_decay,
            skip_loss_z=skip_loss_z, skip_grad_z=skip_grad_z, val_every=val_every, val_steps=val_steps,
            sample_every=sample_every, sample_tokens=sample_tokens, overfit=overfit == 1, beta1=beta1, beta2=beta2,
            eps=eps, clip=clip, recompute=recompute, shuffle=shuffle, seed=seed, master_weights=master_weights == 1,
        ),
        backend,
    )  # fmt: skip
    show_plan(output, training.plan, backend, dry_run)
    if dry_run:
        return
    if out is None:
        output.warning("without --out nothing of this run is kept")
    follow(output, training)


def show_plan(output: render.Output, plan: "Plan", backend: "Backend", dry_run: bool) -> None:
    """The plan: the result of a dry run, else what accompanies a run on a terminal."""
    import sys

    if not dry_run and not sys.stderr.isatty():
        output.info(
            f"{plan.model}: {plan.parameters:,} parameters, {plan.steps - plan.first_step:,} steps of "
            f"{plan.tokens_per_step:,} tokens, {render.format_size(plan.total_memory)}, {backend.description}"
        )
        return
    if dry_run and output.json:
        output.print_json(
            {
                "model": plan.model, "parameters": plan.parameters, "device": plan.device, "precision": plan.precision,
                "threads": plan.threads, "batch": plan.batch, "seq_len": plan.seq_len,
                "accumulation": plan.accumulation, "first_step": plan.first_step, "steps": plan.steps,
                "train_tokens": plan.train_tokens, "val_tokens": plan.val_tokens,
                "flops_per_token": plan.flops_per_token, "memory": plan.memory, "total_memory": plan.total_memory,
                "peak_flops": plan.peak_flops, "expected_seconds": plan.expected_seconds,
            }
        )  # fmt: skip
        return
    c = plan.config
    rows = [
        ("model", f"{plan.model}: {c.num_layers} layers, {c.channels} channels, {c.num_heads} heads"),
        ("parameters", f"{plan.parameters:,}"),
        ("device", backend.description),
        ("precision", f"{plan.precision} ({backend.reason})"),
        ("data", f"{plan.train_tokens:,} tokens to train on, {plan.val_tokens:,} to validate"),
        ("batch", f"{plan.batch} x {plan.seq_len} x {plan.accumulation} = {plan.tokens_per_step:,} tokens per step"),
        ("steps", f"{plan.steps:,}" + (f", from {plan.first_step:,}" if plan.first_step else "")),
        ("FLOPs per token", f"{plan.flops_per_token:,}"),
        *((f"memory: {use}", render.format_size(count)) for use, count in plan.memory.items()),
        ("memory: total", render.format_size(plan.total_memory)),
        ("expected time", f"{render.format_duration(plan.expected_seconds)} without validation and samples"),
    ]
    output.print_table(("plan", "value"), rows, result=dry_run)


def follow(output: render.Output, training: "Training") -> None:
    """Run the training and tell what happens; SIGINT, SIGTERM and SIGHUP end it after the step at hand."""
    import sys

    from llmc_cli.training.reports import StepReport

    received: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        if received:
            raise SystemExit(128 + signum)
        received.append(signum)
        training.stop()
        output.info("finishing this step; once more stops at once")

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP; nohup has it ignored
        signum = getattr(signal, name, None)
        if signum is not None and signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, stop)

    steps, rate = training.plan.steps, 0.0

    def amount(done: float) -> str:
        return f"{int(done)}/{steps}  {rate:,.0f} tok/s"

    printer = Printer(output, training)
    broken: BrokenPipeError | None = None
    with output.progress("training", steps, amount, terminal_only=True) as tell:
        for report in training.run():
            try:
                printer.show(report)
            except BrokenPipeError as error:  # the reader has gone: save, as on an interrupt
                broken = error
                training.stop()
            if isinstance(report, StepReport):
                rate = report.tokens_per_s
                tell(report.step)
    if broken:
        raise broken
    if training.plan.first_step >= steps:
        output.info(f"nothing to do: {training.options.out} already holds step {training.plan.first_step} of {steps}")
    if received:
        sys.stdout.flush()
        raise SystemExit(128 + received[0])


class Printer:
    """Tells the reports of a run: rows under a heading on a terminal, the contract's lines in a pipe, or JSON Lines."""

    def __init__(self, output: render.Output, training: "Training") -> None:
        import sys

        self.output, self.training = output, training
        self.aligned = sys.stdout.isatty() and not output.json
        self.tokenizer: Tokenizer | None = None
        self.headed = False

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
        if not self.headed:
            self.headed = True
            heading = f"{'step':>11}  {'loss':>9}  {'norm':>9}  {'lr':>8}  {'ms':>9}  {'tok/s':>8}   MFU\n"
        step = f"{report.step}/{report.steps}"
        return heading + (
            f"{step:>11}  {report.loss:9.6f}  {report.norm:9.4f}  {report.lr:8.2e}  {report.ms:9.1f}  "
            f"{report.tokens_per_s:8.0f}  {report.mfu:4.0%}"
        )

    def sample(self, ids: list[int]) -> str:
        """Text where the vocabulary is GPT-2's, else the ids."""
        from llmc_cli.models.presets import GPT2_VOCAB_SIZE

        if self.training.config.vocab_size != GPT2_VOCAB_SIZE:
            return "generating:\n---\n" + " ".join(map(str, ids)) + "\n---"
        if self.tokenizer is None:
            from llmc_cli.tokenizer.tokenizer import load_tokenizer

            self.tokenizer = load_tokenizer("gpt2")
        return "generating:\n---\n" + self.tokenizer.decode_bytes(ids).decode("utf-8", "replace") + "\n---"


def step_line(report: "StepReport") -> str:
    """The line of the contract."""
    return (
        f"step {report.step}/{report.steps} | loss {report.loss:.6f} | norm {report.norm:.4f} | lr {report.lr:.2e} | "
        f"{report.ms:.1f} ms | {report.tokens_per_s:.0f} tok/s | {report.mfu:.0%} MFU"
    )
