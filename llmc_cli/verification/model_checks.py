"""Is what is computed here right? Kernels against the float64 reference, and a model against a debug state."""

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llmc_cli.errors import DataError
from llmc_cli.formats.debug_state import DebugState, read_debug_state
from llmc_cli.formats.weights import TENSORS, read_header
from llmc_cli.kernels.cases import OPERATIONS, REFERENCE, as_kept, bound, cases, run
from llmc_cli.kernels.spec import Kernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2, Tokens
from llmc_cli.training.checkpoints import load_model
from llmc_cli.training.optimizer import AdamW
from llmc_cli.verification.comparison import Check, Tally, compare


class Bounds(NamedTuple):
    """What one precision of matrix products is held to."""

    tensor: float
    """On max|error| / max|reference| of logits, loss and each gradient."""
    loss: float
    """On the relative error of a loss after some updates, in which AdamW makes the noise in small gradients large."""
    tiny_loss: float
    """The same for the tiny model."""


BOUNDS = {
    "fp32": Bounds(2e-5, 1e-4, 1e-5),
    "bf16x3": Bounds(1e-4, 1e-4, 2e-5),
    "tf32": Bounds(3e-3, 1e-3, 2e-4),
    "bf16": Bounds(2e-2, 5e-3, 1e-3),
}
"""By precision. In fp32 a smaller error is not seen, however small the element it is in. A flipped bit 30 of any
element is, where max|reference| is below 1e5: it turns a value below 2 into 2 or more, infinity or NaN, and the others
into almost 0, so that the error is 2 at least. In bf16 a tensor is held to twice the error of PyTorch's autocast: with
it fresh GPT-2s of 2, 6 and 12 layers are off by 0.8e-2 to 1.1e-2 in the logits, by about 1e-2 in most gradients and by
1.8e-2 in the worst (against float64; PyTorch 2.13 on a CPU with AMX)."""

STEPS = 10
LEARNING_RATE = 1e-4

LOGIT_ROWS = 64
"""Rows of logits computed at a time."""

PACKAGES = ("llmc-cli", "numpy", "scipy", "numba", "llvmlite")

TINY = ModelConfig(max_seq_len=24, vocab_size=77, num_layers=2, num_heads=3, channels=48)
TINY_BATCH = 3, 19  # B, T
TINY_MICRO_STEPS = 2
TINY_LEARNING_RATE = 1e-3
TINY_MAX_NORM = 0.1  # the gradients' norm is above it, so that they are clipped


def versions() -> dict[str, str]:
    """What computes here, by package, and Python and the system."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def kernel_check_count() -> int:
    """How many checks ``check_kernels`` yields."""
    return sum(len(operation.bounds) for operation in OPERATIONS.values()) + len(TENSORS) + STEPS


def check_kernels(kernels: Kernels, precision: str = "fp32") -> Iterator[Check]:
    """Every operation against the float64 reference, then the gradients and losses of a tiny model's training."""
    for operation in OPERATIONS:
        yield from check_operation(kernels, operation, precision)
    yield from check_training(kernels, precision)


def check_operation(kernels: Kernels, operation: str, precision: str = "fp32") -> Iterator[Check]:
    """Per output the worst of the operation's cases."""
    worst: dict[str, Check] = {}
    rounded = kernels.activation_dtype == np.uint16
    for case in map(as_kept, cases(operation)) if rounded else cases(operation):
        found, expected = run(kernels, case), run(REFERENCE, case)
        for output, values in found.items():
            what = f"{output}: {case.label}"
            limit = bound(operation, output, precision, rounded)
            check = compare(operation, what, values, expected[output], limit)
            if output not in worst or check.badness > worst[output].badness:
                worst[output] = check
    yield from worst.values()


def check_training(kernels: Kernels, precision: str = "fp32") -> Iterator[Check]:
    """A tiny GPT-2 on a backend beside the same on the reference: gradients, then AdamW steps with accumulation,
    clipping and decay."""
    model, reference = (GPT2(TINY, backend) for backend in (kernels, REFERENCE))
    _fill(reference)
    with model.fill() as params:
        params.flat[:] = reference.params.flat
    bounds = BOUNDS[precision]
    trainings = [_TinyTraining(each) for each in (model, reference)]
    for step in range(1, STEPS + 1):
        found, expected = (training.backward() for training in trainings)
        if step == 1:
            for name in TENSORS:
                yield compare(
                    "tiny model",
                    f"gradient {name}",
                    kernels.download(model.grads[name]),
                    reference.grads[name],
                    bounds.tensor,
                )
        yield compare("tiny model", f"loss of step {step}", found, expected, bounds.tiny_loss)
        for training in trainings:
            training.update(step)


def _fill(model: GPT2) -> None:
    """Weights with nothing left at 0 or 1, as in no fresh model, that float32 holds exactly; padding 0."""
    drawn = np.random.default_rng(1).standard_normal(model.params.flat.shape, np.float32)
    model.params.flat[:] = drawn * np.float32(0.125)
    for name in ("ln1w", "ln2w", "lnfw"):
        model.params[name][:] += 1.0
    model.params.flat[:] = model.params.flat.astype(np.float32)
    model.params["wte"][TINY.vocab_size :] = 0.0


class _TinyTraining:
    def __init__(self, model: GPT2) -> None:
        self.model = model
        model.prepare(*TINY_BATCH)
        self.optimizer = AdamW(model, weight_decay=0.1, max_norm=TINY_MAX_NORM)
        rng = np.random.default_rng(2)
        self.batches = [rng.integers(0, TINY.vocab_size, (2, *TINY_BATCH), np.int32) for _ in range(TINY_MICRO_STEPS)]
        for _, targets in self.batches:
            targets[0, 0] = -1  # ignored

    def backward(self) -> float:
        """The gradients of all micro-steps together; gives the mean loss over them."""
        dloss = 1.0 / (TINY_MICRO_STEPS * TINY_BATCH[0] * TINY_BATCH[1])
        loss = 0.0
        for number, (ids, targets) in enumerate(self.batches):
            self.model.forward(ids)
            losses = self.model.backward(targets, dloss, acc=number > 0)
            loss += dloss * float(np.sum(losses, dtype=np.float64))
        return loss

    def update(self, step: int) -> None:
        self.optimizer.gradient_norm()
        self.optimizer.step(TINY_LEARNING_RATE, step)


def state_check_count(steps: int) -> int:
    """How many checks ``check_state`` yields: logits, loss, gradients, the padding's gradient, losses."""
    return 3 + len(TENSORS) + steps


def check_state(
    model_path: Path,
    state_path: Path,
    kernels: Kernels,
    steps: int,
    expected_losses: Sequence[float] | None,
    precision: str = "fp32",
) -> Iterator[Check]:
    """A model file's logits, loss and gradients against its debug state, then the losses of AdamW steps on that batch.

    The losses are compared with ``expected_losses`` (``steps`` at least), or without them with those of the float64
    reference: for 124M parameters that takes minutes and about 10 GB. A NaN or infinity in the state is a failed check.
    FormatError where a file is damaged, or the state is of another shape than the model.
    """
    state = read_debug_state(state_path, read_header(model_path))
    model = load_model(model_path, kernels)
    ids, targets = state.x, state.y
    model.prepare(*ids.shape)
    yield from _check_gradients(model, state, ids, targets, BOUNDS[precision].tensor)
    if steps == 0:
        return
    losses = list(_losses(model, ids, targets, steps))
    del model  # its memory is the reference's now
    if expected_losses is None:
        reference = load_model(model_path, REFERENCE)
        reference.prepare(*ids.shape)
        expected: Iterator[float] = _losses(reference, ids, targets, steps)
    else:
        expected = iter(expected_losses)
    for step, found in enumerate(losses, start=1):
        yield compare(f"loss {step}", "AdamW", found, next(expected), BOUNDS[precision].loss)


def _check_gradients(model: GPT2, state: DebugState, ids: Tokens, targets: Tokens, bound: float) -> Iterator[Check]:
    assert state.logits is not None and state.loss is not None  # read with the model's header
    V, N = model.config.vocab_size, ids.size
    model.forward(ids)
    tally, expected = Tally(), state.logits.reshape(N, V)
    for start in range(0, N, LOGIT_ROWS):
        rows = slice(start, min(start + LOGIT_ROWS, N))
        tally.add(model.logits(rows), expected[rows])
    yield tally.check("logits", "", bound)
    losses = model.backward(targets, 1.0 / N, acc=False)
    yield compare("loss", "", float(np.mean(losses, dtype=np.float64)), state.loss, bound)
    for name in TENSORS:
        rows = slice(V if name == "wte" else None)
        found = model.kernels.download(model.grads[name])
        yield compare(name, "gradient", found[rows], state.grads[name][rows], bound)
    tally = Tally()
    for padding in (
        model.kernels.download(model.grads["wte"])[V:],
        state.grads["wte"][V:],
    ):  # the state has none in version 1
        tally.add(padding, np.zeros_like(padding))
    yield tally.check("wte", "padding", 0.0)


def _losses(model: GPT2, ids: Tokens, targets: Tokens, steps: int) -> Iterator[float]:
    """The mean loss at each of the next AdamW steps, before its update."""
    optimizer = AdamW(model, beta2=0.999, weight_decay=0.01, max_norm=0.0, decayed=TENSORS)
    for step in range(1, steps + 1):
        model.forward(ids)
        losses = model.backward(targets, 1.0 / ids.size, acc=False)
        yield float(np.mean(losses, dtype=np.float64))
        optimizer.step(LEARNING_RATE, step)


def parse_losses(text: str, name: str, steps: int) -> list[float]:
    """The first ``steps`` numbers of ``text``, one a line, which ``name`` holds; DataError naming what is bad."""
    losses: list[float] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            losses.append(float(line))
        except ValueError:
            losses.append(float("nan"))
        if not np.isfinite(losses[-1]):
            raise DataError(f"{name}, line {number}: found {line!r}, expected a loss, a finite number and nothing else")
    if len(losses) < steps:
        raise DataError(f"{name}: found {len(losses)} losses, expected {steps}, one for each of the --steps")
    return losses[:steps]
