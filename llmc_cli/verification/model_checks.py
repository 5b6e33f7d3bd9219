"""Check a model's computations against a debug state."""

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
LOGIT_ROWS = 64  # computed at a time


def state_check_count(steps: int) -> int:
    """Return the number of checks of ``check_state``: logits, loss, gradients, gradient of the padding, losses."""
    return 3 + len(TENSORS) + steps


def check_state(
    model_path: Path,
    state_path: Path,
    kernels: Kernels,
    steps: int,
    expected_losses: Sequence[float] | None,
    precision: str = "fp32",
) -> Iterator[Check]:
    """Check logits, loss and gradients against a debug state, then the losses of AdamW steps on its batch.

    The losses are compared with ``expected_losses`` (at least ``steps``), or if that is None with those of the float64
    reference, which takes minutes and about 10 GB for 124M parameters. A NaN or infinity in the state fails its check.
    Raises FormatError, at the call, if the state is damaged or its shapes are not those of the model, and later if the
    model is damaged.
    """
    state = read_debug_state(state_path, read_header(model_path))
    return _check_state(model_path, state, kernels, steps, expected_losses, precision)


def _check_state(
    model_path: Path,
    state: DebugState,
    kernels: Kernels,
    steps: int,
    expected_losses: Sequence[float] | None,
    precision: str,
) -> Iterator[Check]:
    model = load_model(model_path, kernels)
    ids, targets = state.x, state.y
    model.prepare(*ids.shape)
    yield from _check_gradients(model, state, ids, targets, BOUNDS[precision].tensor)
    if steps == 0:
        return
    losses = list(_losses(model, ids, targets, steps))
    del model  # free its memory for the reference
    if expected_losses is None:
        reference = load_model(model_path, REFERENCE)
        reference.prepare(*ids.shape)
        expected: Iterator[float] = _losses(reference, ids, targets, steps)
    else:
        expected = iter(expected_losses)
    for step, found in enumerate(losses, start=1):
        yield compare(f"loss {step}", "AdamW", found, next(expected), BOUNDS[precision].loss)


def _check_gradients(model: GPT2, state: DebugState, ids: Tokens, targets: Tokens, bound: float) -> Iterator[Check]:
    assert state.logits is not None and state.loss is not None  # present when read with the model's header
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
    ):  # empty in version 1
        tally.add(padding, np.zeros_like(padding))
    yield tally.check("wte", "padding", 0.0)


def _losses(model: GPT2, ids: Tokens, targets: Tokens, steps: int) -> Iterator[float]:
    """Yield the mean loss of each of the next AdamW steps, computed before its update."""
    optimizer = AdamW(model, beta2=0.999, weight_decay=0.01, max_norm=0.0, decayed=TENSORS)
    for step in range(1, steps + 1):
        model.forward(ids)
        model.backward(targets, 1.0 / ids.size, acc=False)
        yield float(np.mean(model.losses(), dtype=np.float64))
        optimizer.step(LEARNING_RATE, step)


def parse_losses(text: str, name: str, steps: int) -> list[float]:
    """Return the first ``steps`` numbers of ``text``, one per line. Raises DataError that names the file and line."""
    losses: list[float] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            losses.append(float(line))
        except ValueError:
            losses.append(float("nan"))
        if not np.isfinite(losses[-1]):
            raise DataError(f"{name}, line {number}: found {line!r}, expected one finite number")
    if len(losses) < steps:
        raise DataError(f"{name}: found {len(losses)} losses, expected {steps}, one for each step (--steps)")
    return losses[:steps]
