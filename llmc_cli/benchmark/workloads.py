"""The workloads of ``bench`` run by llmc on random data. PyTorch's are in ``torch_workloads``."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from llmc_cli.benchmark.timed_kernels import TimedKernels
from llmc_cli.kernels.operation import NO_COST, Cost, ModelSizes, nbytes
from llmc_cli.kernels.operations import call_cost, model_uses
from llmc_cli.kernels.random_arrays import SEED, fill, random_arguments
from llmc_cli.kernels.spec import Kernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.initialization import INIT_STD
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.models.layout import MATRICES, flops_per_token, parameter_count
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.filters import sample_token
from llmc_cli.sampling.generation import Decoder
from llmc_cli.sampling.options import SamplingOptions
from llmc_cli.training.optimizer import AdamW

LR, WEIGHT_DECAY = 1e-4, 0.1
TOKENS = 16  # sampled per sequence and run

Detail = dict[str, Any] | None


@dataclass(frozen=True)
class Task:
    """A prepared task. ``run`` returns details for the report.

    A run consists of ``parts`` equal parts; ``cost`` and the reported time are those of one part.
    """

    run: Callable[[], Detail]
    cost: Cost = NO_COST
    parts: int = 1


class Workload(Protocol):
    """One section of ``bench``. ``prepare`` may invalidate tasks prepared earlier."""

    tasks: tuple[str, ...]

    def prepare(self, task: str) -> Task: ...


def random_model(config: ModelConfig, kernels: Kernels) -> GPT2:
    """Return a model with random weights."""
    model = GPT2(config, kernels)
    fill(kernels, model.params.flat, INIT_STD)
    for name in ("ln1w", "ln2w", "lnfw"):
        kernels.upload(model.params[name], np.ones(model.params[name].shape, np.float32))
    model.publish()
    return model


def random_ids(shape: tuple[int, ...], vocab_size: int) -> NDArray[np.int32]:
    return np.random.default_rng(SEED).integers(0, vocab_size, shape, np.int32)


class TrainWorkload:
    """Whole training steps, as the trainer runs them, all on the same batch.

    "step" runs forward, loss, backward, the prefetch of the next batch, gradient norm and clipped AdamW. "split" runs
    the same over ``TimedKernels``.
    """

    tasks: tuple[str, ...] = ("step", "split")

    def __init__(self, kernels: Kernels, config: ModelConfig, B: int, T: int, recompute: int = 0) -> None:
        self.config, self.B, self.T, self.recompute = config, B, T, recompute
        self.inputs = random_ids((B, T), config.vocab_size)
        self.targets = np.roll(self.inputs, -1, axis=1)
        self.cost = Cost(B * T * flops_per_token(config, T), 0)
        self.timed = TimedKernels(kernels)
        self._kernels = {"step": kernels, "split": cast(Kernels, self.timed)}
        self._build(kernels)

    def _build(self, kernels: Kernels) -> None:
        self.kernels, self.steps = kernels, 0
        self.model = random_model(self.config, kernels)
        self.model.prepare(self.B, self.T, recompute=self.recompute)
        self.optimizer = AdamW(self.model, weight_decay=WEIGHT_DECAY)

    def prepare(self, task: str) -> Task:
        if self._kernels[task] is not self.kernels:
            del self.model, self.optimizer  # free their memory before building them again
            self._build(self._kernels[task])
            self.step()  # touches all memory once, untimed
        return Task(self.step if task == "step" else self.split, self.cost)

    def step(self) -> Detail:
        launches = self.kernels.launch_count()
        self.model.forward(self.inputs)
        self.model.backward(self.targets, 1 / (self.B * self.T), acc=False)
        self.prefetch()
        loss = float(np.mean(self.model.losses(), dtype=np.float64))
        norm = self.optimizer.gradient_norm()
        self.steps += 1
        self.optimizer.step(LR, self.steps)
        self.kernels.synchronize()
        return {"loss": loss, "norm": norm, "launches": self.kernels.launch_count() - launches}

    def prefetch(self) -> None:
        self.model.prefetch(self.inputs, self.targets)

    def split(self) -> Detail:
        """Run a step and return the calls, time, cost and launches of each operation."""
        self.timed.clear()
        self.step()
        return {
            name: {
                "calls": self.timed.calls[name],
                "seconds": seconds,
                "flops": self.timed.cost[name].flops,
                "bytes": self.timed.cost[name].bytes,
                "launches": self.timed.launches[name],
            }
            for name, seconds in self.timed.seconds.items()
        }


class SampleWorkload:
    """Greedy sampling of B sequences after T positions in the cache.

    There is one task per backend; ``backends`` is keyed by the precision of the weights. A part is one token.
    """

    def __init__(self, backends: dict[str, Kernels], config: ModelConfig, B: int, T: int) -> None:
        self.backends, self.config, self.B, self.T = backends, config, B, T
        self.tasks = tuple(f"token {precision}" for precision in backends)
        self.tokens = min(TOKENS, config.max_seq_len - T)

    def prepare(self, task: str) -> Task:
        kernels = self.backends[task.split()[1]]
        model = random_model(self.config, kernels)
        cache = KVCache(self.config, kernels, self.B, self.T + self.tokens, self.B)
        fill(kernels, cache.keys)
        fill(kernels, cache.values)
        decoder, options, generator = Decoder(model, cache), SamplingOptions(temperature=0), Xorshift(SEED)

        def run() -> Detail:
            cache.lengths[:] = self.T
            tokens = [0] * self.B
            for _ in range(self.tokens):
                tokens = [sample_token(row, options, generator) for row in decoder.step(tokens)]
            return None

        weights = [model.head, *(weight for name in MATRICES for weight in model.weights[name])]
        sizes = [weight_size(weight) for weight in weights]
        flops = 2 * self.B * sum(count for count, _ in sizes)
        return Task(run, Cost(flops, sum(stored for _, stored in sizes)), self.tokens)


def weight_size(weight: Any) -> tuple[int, int]:
    """Return the number of elements of a bound weight and the bytes they are stored in."""
    if hasattr(weight, "master"):
        return weight.master.size, nbytes(weight.rows, getattr(weight, "scales", None))
    return weight.size, weight.nbytes


class PreproWorkload:
    """Write the bundled text to token files; as a second task, only tokenize it."""

    tasks: tuple[str, ...] = ("files", "tokenizer")

    def __init__(self) -> None:
        from llmc_cli.data.tinyshakespeare import shakespeare_sections, shakespeare_text
        from llmc_cli.tokenizer.tokenizer import load_tokenizer

        self.text = shakespeare_text("bundled").text
        self.sections = shakespeare_sections
        self.tokenizer = load_tokenizer("gpt2")
        self.bytes = len(self.text.encode())

    def prepare(self, task: str) -> Task:
        return Task(self.write_files if task == "files" else self.encode, Cost(0, self.bytes))

    def write_files(self) -> Detail:
        from llmc_cli.data.shard_plan import ShardPlan
        from llmc_cli.data.shards import write_token_files

        with tempfile.TemporaryDirectory() as folder:
            files = write_token_files(self.sections(self.text), self.tokenizer, ShardPlan(Path(folder), "bench"))
            return {"tokens": files.tokens}

    def encode(self) -> Detail:
        return {"tokens": sum(1 + self.tokenizer.encode(piece.text).size for piece in self.sections(self.text))}


class KernelsWorkload:
    """Each operation at the shapes at which a training step or sampling uses it."""

    def __init__(self, kernels: Kernels, config: ModelConfig, B: int, T: int) -> None:
        self.kernels = kernels
        self._uses = {task: (name, sizes) for name, task, sizes in model_uses(model_sizes(config, B, T))}
        self.tasks = tuple(self._uses)

    def prepare(self, task: str) -> Task:
        name, sizes = self._uses[task]
        arguments = random_arguments(self.kernels, name, sizes)
        operation = getattr(self.kernels, name)

        def run() -> Detail:
            operation(*arguments)
            self.kernels.synchronize()
            return None

        return Task(run, call_cost(self.kernels, name, arguments))


def model_sizes(config: ModelConfig, B: int, T: int) -> ModelSizes:
    return ModelSizes(
        B, T, config.channels, config.num_heads, config.vocab_size, config.padded_vocab_size, config.max_seq_len,
        parameter_count(config), config.norm_eps,
    )  # fmt: skip
