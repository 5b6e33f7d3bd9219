"""What a training run is asked for, and what it will take."""

import math
from dataclasses import dataclass, replace

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.kernels.backend import Backend
from llmc_cli.machine.memory import resident_memory
from llmc_cli.models.activations import activation_shapes, gradient_shapes, statistic_shapes
from llmc_cli.models.arena import ALIGN, arena_bytes
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.layout import MATRICES, flops_per_token, parameter_count, parameter_shapes
from llmc_cli.training.options import TrainOptions

USUAL_SHARE = 0.6  # of the matmul ceiling that a whole step reaches, for the expected time


@dataclass(frozen=True)
class Plan:
    """What a run will take. Memory in bytes, by use."""

    model: str
    config: ModelConfig
    device: str
    precision: str
    threads: int
    batch: int
    seq_len: int
    accumulation: int
    first_step: int
    steps: int
    train_tokens: int
    val_tokens: int
    memory: dict[str, int]
    peak_flops: float  # FLOP/s of a large product

    @property
    def parameters(self) -> int:
        return parameter_count(self.config)

    @property
    def flops_per_token(self) -> int:
        return flops_per_token(self.config, self.seq_len)

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.seq_len * self.accumulation

    @property
    def total_memory(self) -> int:
        return sum(self.memory.values())

    @property
    def expected_seconds(self) -> float:
        """From the matmul ceiling, at the usual share of it; validation and samples not counted."""
        steps = self.steps - self.first_step
        return steps * self.tokens_per_step * self.flops_per_token / (USUAL_SHARE * self.peak_flops)


def accumulation(options: TrainOptions) -> int:
    """Micro-steps per update."""
    tokens = options.batch * options.seq_len
    total = tokens if options.total_batch is None else options.total_batch
    if total < tokens or total % tokens:
        raise UsageError(f"--total-batch {total} is not a multiple of batch x sequence length = {tokens}")
    return total // tokens


def memory_by_use(config: ModelConfig, options: TrainOptions, backend: Backend) -> dict[str, int]:
    """Bytes of what training allocates, and on the CPU of what the program with its libraries holds already."""
    B, T, dtype, kept = options.batch, options.seq_len, backend.kernels.dtype, backend.kernels.activation_dtype
    parameters = arena_bytes(parameter_shapes(config), dtype)
    activations = arena_bytes(activation_shapes(config, B, T, options.recompute), kept, ALIGN)
    statistics = arena_bytes(statistic_shapes(config, B, T), dtype, ALIGN)
    scratch = arena_bytes(gradient_shapes(config, B, T), kept, ALIGN)
    workspace = backend.kernels.workspace_bytes(B, T, config.channels, config.num_heads, config.padded_vocab_size)
    shapes = parameter_shapes(config)
    bound = backend.kernels.bind_bytes(sum(math.prod(shapes[name]) for name in ("wte", *MATRICES)))
    uses = {
        "parameters": parameters + bound,
        "gradients": parameters,
        "moments": 2 * parameters,
        "activations": activations + statistics,
        "workspace": scratch + workspace,
    }
    return {"program": resident_memory() or 0, **uses} if backend.device == "cpu" else uses


def check_memory(config: ModelConfig, options: TrainOptions, backend: Backend) -> None:
    """MissingError where training takes more than the memory there is, before anything is allocated."""

    def total(batch: int) -> int:
        return sum(memory_by_use(config, replace(options, batch=batch), backend).values())

    needed = total(options.batch)
    if backend.memory is None or needed <= backend.memory:
        return
    most = next((batch for batch in range(options.batch - 1, 0, -1) if total(batch) <= backend.memory), None)
    rather = f"--batch {most} would fit" if most else "take a smaller model or sequence length"
    there = "this machine has" if backend.device == "cpu" else f"on {backend.device} are free"
    raise MissingError(
        f"training {options.model} at {options.batch} x {options.seq_len} takes {needed / 1e9:.1f} GB of memory, and "
        f"{there} {backend.memory / 1e9:.1f} GB; {rather}"
    )
