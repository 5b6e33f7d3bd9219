"""The plan of a training run: read the headers of its files, check its options and compute what it needs."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmc_cli.data.batches import Batches
from llmc_cli.errors import MissingError, UsageError
from llmc_cli.kernels.backend import Backend
from llmc_cli.kernels.peak import peak_flops
from llmc_cli.machine.memory import resident_memory
from llmc_cli.models.activations import activation_shapes, gradient_shapes, statistic_shapes
from llmc_cli.models.arena import ALIGN, arena_bytes
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.files import read_config, resolve_config
from llmc_cli.models.layout import MATRICES, flops_per_token, parameter_count, parameter_shapes
from llmc_cli.training.checkpoints import RunFolder
from llmc_cli.training.options import TrainOptions

USUAL_MFU = 0.6  # of a training step, to estimate its time


@dataclass(frozen=True)
class Plan:
    """A run whose options have been checked. ``memory`` is in bytes by use, ``peak_flops`` in FLOP/s."""

    options: TrainOptions
    config: ModelConfig
    checkpoint: Path | None  # the model file of the checkpoint that the run resumes from
    first_step: int
    steps: int
    accumulation: int  # micro-steps per step
    train_tokens: int
    val_tokens: int
    data_fingerprint: str
    memory: dict[str, int]
    peak_flops: float

    @property
    def parameters(self) -> int:
        return parameter_count(self.config)

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config, self.options.seq_len)

    @property
    def tokens_per_step(self) -> int:
        return self.options.batch * self.options.seq_len * self.accumulation

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def expected_seconds(self) -> float:
        """An estimate from the usual MFU, without validation and samples."""
        steps = self.steps - self.first_step
        return steps * self.tokens_per_step * self.flops_per_token / (USUAL_MFU * self.peak_flops)


def make_plan(options: TrainOptions, backend: Backend) -> Plan:
    """Plan a run on ``backend``; only headers are read, and nothing is written.

    UsageError if the options contradict each other, the model, the data or the run in ``options.out``; DataError if
    data are missing or too small; MissingError if memory is too small.
    """
    folder = RunFolder(options.out) if options.out else None
    first_step = _first_step(options, folder)
    checkpoint = folder.model_path(first_step) if folder and first_step else None
    config = read_config(checkpoint) if checkpoint else resolve_config(options.model)
    for name, length in (
        ("--seq-len", options.seq_len),
        ("--sample-tokens", options.sample_tokens if options.sample_every else 0),
    ):
        if length > config.max_seq_len:
            raise UsageError(f"{name} {length}: {options.model} has a context of {config.max_seq_len} tokens")
    accumulation = accumulation_steps(options)
    train_data, val_data = train_batches(options, config), val_batches(options, config)
    steps = options.steps
    if steps == -1:  # one epoch
        steps = train_data.num_tokens // (options.batch * options.seq_len * accumulation)
        if steps == 0:
            raise UsageError(f"{train_data.pattern}: {train_data.num_tokens:,} tokens are fewer than one step needs")
    if steps < 1:
        raise UsageError(f"--steps {steps}: expected at least 1, or -1 for one epoch")
    if options.val_every and options.val_steps == 0:
        raise UsageError(
            "--val-steps 0: expected at least 1, or -1 for all batches; --val-every 0 switches validation off"
        )
    check_memory(config, options, backend)
    peak = peak_flops(backend.kernels)  # before memory is counted: BLAS allocates its buffers at the first product
    plan = Plan(
        options=options,
        config=config,
        checkpoint=checkpoint,
        first_step=first_step,
        steps=steps,
        accumulation=accumulation,
        train_tokens=train_data.num_tokens,
        val_tokens=val_data.num_tokens if val_data else 0,
        data_fingerprint=train_data.fingerprint(),
        memory=memory_by_use(config, options, backend),
        peak_flops=peak,
    )
    if folder and first_step and not options.force:
        _check_course(plan, folder.read_record())
    return plan


def run_record(plan: Plan) -> dict[str, Any]:
    """What run.json stores to recognize the run: the options that change its course, and a hash of its data."""
    course = plan.options.course() | {"steps": plan.steps, "total_batch": plan.tokens_per_step}
    return {"arguments": course, "data": plan.data_fingerprint}


def train_batches(options: TrainOptions, config: ModelConfig) -> Batches:
    """The training data; with ``overfit``, the validation data in order, as in llm.c."""
    pattern, option = (options.val_data, "--val-data") if options.overfit else (options.data, "--data")
    seed = options.seed if options.shuffle and not options.overfit else None
    return Batches(pattern, options.batch, options.seq_len, config.vocab_size, shuffle_seed=seed, option=option)


def val_batches(options: TrainOptions, config: ModelConfig) -> Batches | None:
    """The validation data; None if there is no validation."""
    if not options.val_every:
        return None
    return Batches(options.val_data, options.batch, options.seq_len, config.vocab_size, option="--val-data")


def accumulation_steps(options: TrainOptions) -> int:
    """Return the number of micro-steps per step."""
    tokens = options.batch * options.seq_len
    total = tokens if options.total_batch == -1 else options.total_batch
    if total < tokens or total % tokens:
        raise UsageError(
            f"--total-batch {total}: expected a multiple of --batch x --seq-len = {options.batch} x {options.seq_len} "
            f"= {tokens}"
        )
    return total // tokens


def memory_by_use(config: ModelConfig, options: TrainOptions, backend: Backend) -> dict[str, int]:
    """Return the bytes that training allocates; on the CPU also those that the process already uses (``program``)."""
    B, T, kernels = options.batch, options.seq_len, backend.kernels
    shapes = parameter_shapes(config)
    parameters = arena_bytes(shapes, kernels.dtype)
    activations = arena_bytes(activation_shapes(config, B, T, options.recompute), kernels.activation_dtype, ALIGN)
    statistics = arena_bytes(statistic_shapes(config, B, T), kernels.dtype, ALIGN)
    scratch = arena_bytes(gradient_shapes(config, B, T), kernels.activation_dtype, ALIGN)
    workspace = kernels.workspace_bytes(B, T, config.channels, config.num_heads, config.padded_vocab_size)
    bound = kernels.bind_bytes(sum(math.prod(shapes[name]) for name in ("wte", *MATRICES)))
    uses = {
        "parameters": parameters + bound,
        "gradients": parameters,
        "moments": 2 * parameters,
        "activations": activations + statistics,
        "workspace": scratch + workspace,
    }
    return {"program": resident_memory() or 0, **uses} if backend.device == "cpu" else uses


def check_memory(config: ModelConfig, options: TrainOptions, backend: Backend) -> None:
    """Raise MissingError if training needs more memory than there is."""

    def total(batch: int) -> int:
        return sum(memory_by_use(config, replace(options, batch=batch), backend).values())

    needed = total(options.batch)
    if backend.memory is None or needed <= backend.memory:
        return
    largest = next((batch for batch in range(options.batch - 1, 0, -1) if total(batch) <= backend.memory), None)
    advice = f"--batch {largest} would fit" if largest else "use a smaller model or sequence length"
    available = f"{backend.memory / 1e9:.1f} GB"
    where = f"this machine has {available}" if backend.device == "cpu" else f"{available} are free on {backend.device}"
    raise MissingError(
        f"training {options.model} at {options.batch} x {options.seq_len} needs {needed / 1e9:.1f} GB of memory; only "
        f"{where}; {advice}"
    )


def _first_step(options: TrainOptions, folder: RunFolder | None) -> int:
    """Return 0, or the step of the checkpoint to resume from; UsageError if a fresh run would overwrite an old one."""
    if options.resume and not folder:
        raise UsageError("--resume needs --out, the directory of the run to resume")
    steps = folder.steps() if folder else []
    if not steps:
        return 0
    if not options.resume:
        raise UsageError(
            f"{options.out} holds a complete checkpoint (step {steps[-1]}); resume from it with --resume 1, "
            "or use another --out"
        )
    return steps[-1]


def _check_course(plan: Plan, previous: dict[str, Any]) -> None:
    """Raise UsageError if the run to resume, recorded as ``previous``, had other options or data."""
    if "arguments" not in previous:
        return  # started by llm.c, which does not record them
    current = run_record(plan)
    changed = [
        f"--{name.replace('_', '-')} was {previous['arguments'].get(name)}, is {value}"
        for name, value in current["arguments"].items()
        if previous["arguments"].get(name) != value
    ]
    if previous["data"] != current["data"]:
        changed.append("the training data are different")
    if changed:
        raise UsageError(
            f"{plan.options.out}: resuming would change the course of the run: {'; '.join(changed)}. "
            "Give the same options, or --force"
        )
