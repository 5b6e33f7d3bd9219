"""Is what is computed here right? Kernels against the float64 reference, and a model against a debug state."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from llmc_cli.errors import DataError
from llmc_cli.formats.debug_state import DebugState, read_debug_state
from llmc_cli.formats.weights import TENSORS, read_header
from llmc_cli.kernels.reference.kernels import REFERENCE
from llmc_cli.kernels.spec import Kernels
from llmc_cli.models.arena import Tokens
from llmc_cli.models.files import load_model
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.training.optimizer import AdamW
from llmc_cli.verification.bounds import BOUNDS
from llmc_cli.verification.comparison import Check, Tally, compare

LEARNING_RATE = 1e-4

LOGIT_ROWS = 64
"""Rows of logits computed at a time."""


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
    model.backward(targets, 1.0 / N, acc=False)
    yield compare("loss", "", float(np.mean(model.losses(), dtype=np.float64)), state.loss, bound)
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
        model.backward(targets, 1.0 / ids.size, acc=False)
        yield float(np.mean(model.losses(), dtype=np.float64))
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
