"""What ``bench`` runs of ours: tasks by name, each prepared once and then run again and again, on random data."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmc_cli.benchmark.timed_kernels import TimedKernels, launches
from llmc_cli.kernels.costs import NO_COST, Cost, cost, size
from llmc_cli.kernels.random_arrays import SEED, fill
from llmc_cli.kernels.spec import Array, Kernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2, MATRICES
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.models.layout import flops_per_token, parameter_count, parameter_shapes
from llmc_cli.rng import Xorshift
from llmc_cli.sampling.filters import SamplingOptions, sample_token
from llmc_cli.sampling.generation import Decoder
from llmc_cli.training.optimizer import AdamW

LR, WEIGHT_DECAY, STD = 1e-4, 0.1, 0.02
TOKENS = 16  # of each sequence, a run of sampling: long enough that its beginning does not count

Detail = dict[str, Any] | None


@dataclass(frozen=True)
class Task:
    """Ready to ``run``; what a run returns goes into the report as it is. A run has ``parts`` equal parts, of which the
    time is told; ``cost`` is that of one."""

    run: Callable[[], Detail]
    cost: Cost = NO_COST
    parts: int = 1


class Workload(Protocol):
    """One section of ``bench``. ``prepare`` may drop what an earlier task needed."""

    tasks: tuple[str, ...]

    def prepare(self, task: str) -> Task: ...


def random_model(config: ModelConfig, kernels: Kernels) -> GPT2:
    model = GPT2(config, kernels)
    fill(kernels, model.params.flat, STD)
    for name in ("ln1w", "ln2w", "lnfw"):
        kernels.upload(model.params[name], np.ones(model.params[name].shape, np.float32))
    model.publish()
    return model


def random_ids(shape: tuple[int, ...], vocab_size: int) -> NDArray[np.int32]:
    return np.random.default_rng(SEED).integers(0, vocab_size, shape, np.int32)


class TrainWorkload:
    """Whole training steps as the trainer makes them: forward, loss, backward, while that is under way the next batch
    sent, norm, clipped AdamW. All batches are the same."""

    tasks: tuple[str, ...] = ("step", "split")

    def __init__(self, kernels: Kernels, config: ModelConfig, B: int, T: int, recompute: int = 0) -> None:
        self.kernels, self.B, self.T = kernels, B, T
        self.model = random_model(config, kernels)
        self.model.prepare(B, T, recompute=recompute)
        self.optimizer = AdamW(self.model, weight_decay=WEIGHT_DECAY)
        self.inputs = random_ids((B, T), config.vocab_size)
        self.targets = np.roll(self.inputs, -1, axis=1)
        self.done = 0
        self.cost = Cost(B * T * flops_per_token(config, T), 0)

    def prepare(self, task: str) -> Task:
        return Task(self.step if task == "step" else self.split, self.cost)

    def step(self) -> Detail:
        launched = launches(self.kernels)
        self.model.forward(self.inputs)
        self.model.backward(self.targets, 1 / (self.B * self.T), acc=False)
        self.prefetch()
        loss = float(np.mean(self.model.losses(), dtype=np.float64))
        norm = self.optimizer.gradient_norm()
        self.done += 1
        self.optimizer.step(LR, self.done)
        self.kernels.synchronize()
        return {"loss": loss, "norm": norm, "launches": launches(self.kernels) - launched}

    def prefetch(self) -> None:
        self.model.prefetch(self.inputs, self.targets)

    def split(self) -> Detail:
        """A step that also says, per operation, how often it was called, for how long, and what it cost."""
        timed = TimedKernels(self.kernels)
        self.model.kernels = timed  # it forwards what it does not have
        try:
            self.step()
        finally:
            self.model.kernels = self.kernels
        return {
            name: {
                "calls": timed.calls[name],
                "seconds": seconds,
                "flops": timed.cost[name].flops,
                "bytes": timed.cost[name].bytes,
                "launches": timed.launches[name],
            }
            for name, seconds in timed.seconds.items()
        }


class SampleWorkload:
    """B sequences that grow by some tokens behind T positions in the cache, the likeliest each time: a task for each of
    the backends, which are named after the precision of their weights. The time told is a token's."""

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
    """Numbers of a bound weight, and the bytes that they are kept in."""
    if hasattr(weight, "master"):
        return weight.master.size, size(weight.rows, getattr(weight, "scales", None))
    return weight.size, weight.nbytes


class PreproWorkload:
    """The bundled text to token files, and the tokenizer alone on the same text."""

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
        from llmc_cli.data.shards import ShardPlan, write_token_files

        with tempfile.TemporaryDirectory() as folder:
            files = write_token_files(self.sections(self.text), self.tokenizer, ShardPlan(Path(folder), "bench"))
            return {"tokens": files.tokens}

    def encode(self) -> Detail:
        return {"tokens": sum(1 + self.tokenizer.encode(piece.text).size for piece in self.sections(self.text))}


class KernelsWorkload:
    """Each operation of the backend at the shapes that it has in a training step, or in sampling."""

    def __init__(self, kernels: Kernels, config: ModelConfig, B: int, T: int) -> None:
        self.kernels, self.config, self.B, self.T = kernels, config, B, T
        C = config.channels
        linear = {"qkv": (C, 3 * C, True), "attproj": (C, C, False), "fcproj": (4 * C, C, False)}
        linear_back = {"qkv": (C, 3 * C), "attproj": (C, C), "fc": (C, 4 * C)}
        self._arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
            "embedding_forward": self._embedding_forward,
            "embedding_backward": self._embedding_backward,
            "residual_norm_forward": self._norm_forward,
            "residual_norm_backward": self._norm_backward,
            **{f"linear_forward {name}": partial(self._linear_forward, *shape) for name, shape in linear.items()},
            **{
                f"linear_backward {name}": partial(self._linear_backward, *shape) for name, shape in linear_back.items()
            },
            "linear_gelu_forward fc": self._linear_gelu_forward,
            "gelu_forward": self._gelu_forward,
            "gelu_linear_backward fcproj": self._gelu_linear_backward,
            "attention_forward": self._attention_forward,
            "attention_backward": self._attention_backward,
            "attention_cached": self._attention_cached,
            "head_loss": self._head_loss,
            "head_loss gradient": self._head_loss_gradient,
            "head_logits": self._head_logits,
            "sum_squares": self._sum_squares,
            "adamw": self._adamw,
        }
        self.tasks = tuple(self._arguments)

    def prepare(self, task: str) -> Task:
        name, arguments = task.split()[0], self._arguments[task]()
        operation = getattr(self.kernels, name)

        def run() -> Detail:
            operation(*arguments)
            self.kernels.synchronize()
            return None

        return Task(run, cost(self.kernels, name, arguments))

    @property
    def N(self) -> int:
        return self.B * self.T

    def new(self, *shape: int, std: float = 1.0) -> Array:
        """Random numbers; outputs too, so that no run writes to memory it has not touched."""
        return fill(self.kernels, self.kernels.alloc(shape, self.kernels.dtype), std)

    def activation(self, *shape: int) -> Array:
        """The same in the precision of activations."""
        return fill(self.kernels, self.kernels.alloc(shape, self.kernels.activation_dtype))

    def integers(self, values: NDArray[np.int32]) -> Array:
        array = self.kernels.alloc(values.shape, np.int32)
        self.kernels.upload(array, values)
        return array

    def weight(self, *shape: int) -> Any:
        weight = self.kernels.bind(self.new(*shape, std=STD))
        self.kernels.publish([weight])
        return weight

    def _ids(self) -> tuple[Array, Array]:
        positions = np.tile(np.arange(self.T, dtype=np.int32), self.B)
        return self.integers(random_ids((self.N,), self.config.vocab_size)), self.integers(positions)

    def _tables(self) -> tuple[Array, Array]:
        shapes = parameter_shapes(self.config)
        return self.new(*shapes["wte"]), self.new(*shapes["wpe"])

    def _embedding_forward(self) -> tuple[Any, ...]:
        return self.activation(self.N, self.config.channels), *self._tables(), *self._ids()

    def _embedding_backward(self) -> tuple[Any, ...]:
        return *self._tables(), self.activation(self.N, self.config.channels), *self._ids(), False

    def _norm_forward(self) -> tuple[Any, ...]:
        N, C, eps = self.N, self.config.channels, self.config.norm_eps
        rows, vectors = [self.activation(N, C) for _ in range(4)], [self.new(C) for _ in range(3)]
        return *rows[:2], self.new(N), self.new(N), *rows[2:], *vectors, eps

    def _norm_backward(self) -> tuple[Any, ...]:
        N, C = self.N, self.config.channels
        dx, dy, res = (self.activation(N, C) for _ in range(3))
        return dx, self.new(C), self.new(C), dy, res, self.new(N), self.new(N), self.new(C), dx, False

    def _linear_forward(self, I: int, O: int, biased: bool) -> tuple[Any, ...]:  # noqa: E741
        """Without a bias where the norm behind it adds that."""
        b = self.new(O) if biased else None
        return self.activation(self.N, O), self.activation(self.N, I), self.weight(O, I), b

    def _linear_backward(self, I: int, O: int) -> tuple[Any, ...]:  # noqa: E741
        dx, dy, x = (self.activation(self.N, width) for width in (I, O, I))
        return dx, self.new(O, I), self.new(O), dy, x, self.weight(O, I), False

    def _linear_gelu_forward(self) -> tuple[Any, ...]:
        N, C, F = self.N, self.config.channels, 4 * self.config.channels
        return self.activation(N, F), self.activation(N, F), self.activation(N, C), self.weight(F, C), self.new(F)

    def _gelu_forward(self) -> tuple[Any, ...]:
        N, F = self.N, 4 * self.config.channels
        return self.activation(N, F), self.activation(N, F)

    def _gelu_linear_backward(self) -> tuple[Any, ...]:
        N, C, F = self.N, self.config.channels, 4 * self.config.channels
        dpre, act, pre = (self.activation(N, F) for _ in range(3))
        return dpre, self.new(C, F), self.new(C), self.activation(N, C), act, pre, self.weight(C, F), False

    def _attention_forward(self) -> tuple[Any, ...]:
        B, T, C, NH = self.B, self.T, self.config.channels, self.config.num_heads
        return self.activation(B, T, C), self.new(B, NH, T), self.activation(B, T, 3 * C), NH

    def _attention_backward(self) -> tuple[Any, ...]:
        out, lse, qkv, NH = self._attention_forward()
        self.kernels.attention_forward(out, lse, qkv, NH)  # a lse that fits, or exponentials would overflow
        return self.activation(*qkv.shape), self.activation(*out.shape), out, lse, qkv, NH

    def _attention_cached(self) -> tuple[Any, ...]:
        B, C, NH = self.B, self.config.channels, self.config.num_heads
        keys, values = (self.activation(B, NH, self.T, C // NH) for _ in range(2))
        lengths = self.integers(np.full(B, self.T - 1, np.int32))
        return self.activation(B, 1, C), keys, values, self.activation(B, 1, 3 * C), lengths, NH

    def _head(self) -> tuple[Array, Any, Array]:
        C, V = self.config.channels, self.config.vocab_size
        weight = self.weight(self.config.padded_vocab_size, C)
        return self.activation(self.N, C), weight, self.integers(random_ids((self.N,), V))

    def _head_loss(self) -> tuple[Any, ...]:
        return self.new(self.N), None, None, *self._head(), self.config.vocab_size, 0.0, False

    def _head_loss_gradient(self) -> tuple[Any, ...]:
        N, C, V = self.N, self.config.channels, self.config.vocab_size
        dw = self.new(self.config.padded_vocab_size, C)
        return self.new(N), self.activation(N, C), dw, *self._head(), V, 1 / N, False

    def _head_logits(self) -> tuple[Any, ...]:
        x, weight, _ = self._head()
        return self.new(self.B, self.config.vocab_size), x[: self.B], weight

    def _sum_squares(self) -> tuple[Any, ...]:
        return self.kernels.alloc((1,), np.float64), self.new(parameter_count(self.config))

    def _adamw(self) -> tuple[Any, ...]:
        return adamw_arguments(self.kernels, parameter_count(self.config))


def adamw_arguments(kernels: Kernels, P: int) -> tuple[Any, ...]:
    """What an update of P parameters takes, clipping on."""
    master, m, g = (fill(kernels, kernels.alloc((P,), kernels.dtype), STD) for _ in range(3))
    v = fill(kernels, kernels.alloc((P,), kernels.dtype), STD, np.abs)  # squares on the average
    segments = kernels.alloc((1, 3), np.int64)
    hyper, sumsq = kernels.alloc((8,), np.float64), kernels.alloc((1,), np.float64)
    kernels.upload(segments, np.array([[0, P, 1]]))
    kernels.upload(hyper, np.array([LR, 0.9, 0.95, 1e-8, WEIGHT_DECAY, 0.1, 0.05, 1]))
    kernels.upload(sumsq, np.array([STD**2 * P]))
    return master, m, v, g, segments, hyper, sumsq
