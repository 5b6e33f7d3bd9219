"""Check a backend's kernels against the float64 reference: every operation, then a tiny model's training."""

import importlib.metadata
import platform
from collections.abc import Iterator

import numpy as np

from llmc_cli.formats.weights import TENSORS
from llmc_cli.kernels.cases import cases, run, with_bf16_activations
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.reference.kernels import REFERENCE
from llmc_cli.kernels.spec import Kernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.training.optimizer import AdamW
from llmc_cli.verification.bounds import BOUNDS, STEPS
from llmc_cli.verification.comparison import Check, compare

PACKAGES = ("llmc-cli", "numpy", "scipy", "numba", "llvmlite")

TINY = ModelConfig(max_seq_len=24, vocab_size=77, num_layers=2, num_heads=3, channels=48)
TINY_BATCH = 3, 19  # B, T
TINY_MICRO_STEPS = 2
TINY_LEARNING_RATE = 1e-3
TINY_MAX_NORM = 0.1  # below the norm of the gradients, so that they are clipped


def versions() -> dict[str, str]:
    """Return the versions of the system, Python and the packages that compute."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def kernel_check_count() -> int:
    """Return the number of checks that ``check_kernels`` yields."""
    return sum(len(operation.bounds) for operation in OPERATIONS.values()) + len(TENSORS) + STEPS


def check_kernels(kernels: Kernels, precision: str = "fp32") -> Iterator[Check]:
    """Yield the checks of every operation, then of the gradients and losses of a tiny model's training."""
    for operation in OPERATIONS:
        yield from check_operation(kernels, operation, precision)
    yield from check_training(kernels, precision)


def check_operation(kernels: Kernels, operation: str, precision: str = "fp32") -> Iterator[Check]:
    """Yield for each output the check of the case with the largest error relative to its bound."""
    worst: dict[str, Check] = {}
    bf16_activations = kernels.activation_dtype == np.uint16
    for case in cases(operation):
        if bf16_activations:
            case = with_bf16_activations(case)
        found, expected = run(kernels, case), run(REFERENCE, case)
        for output, values in found.items():
            bound = OPERATIONS[operation].bound(output, precision, bf16_activations)
            check = compare(operation, f"{output}: {case.label}", values, expected[output], bound)
            if output not in worst or check.badness > worst[output].badness:
                worst[output] = check
    yield from worst.values()


def check_training(kernels: Kernels, precision: str = "fp32") -> Iterator[Check]:
    """Train a tiny GPT-2 on the backend and on the reference, and compare gradients and losses.

    Each AdamW step accumulates gradients over micro-steps and uses clipping and weight decay.
    """
    model, reference = (GPT2(TINY, backend) for backend in (kernels, REFERENCE))
    _fill(reference)
    with model.overwrite_params() as params:
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
    """Fill all parameters, biases too, with random numbers that float32 represents exactly; padding is 0."""
    values = np.random.default_rng(1).standard_normal(model.params.flat.shape, np.float32)
    model.params.flat[:] = values * np.float32(0.125)
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
        """Accumulate the gradients of all micro-steps and return their mean loss."""
        dloss = 1.0 / (TINY_MICRO_STEPS * TINY_BATCH[0] * TINY_BATCH[1])
        loss = 0.0
        for number, (ids, targets) in enumerate(self.batches):
            self.model.forward(ids)
            self.model.backward(targets, dloss, acc=number > 0)
            loss += dloss * float(np.sum(self.model.losses(), dtype=np.float64))
        return loss

    def update(self, step: int) -> None:
        self.optimizer.gradient_norm()
        self.optimizer.step(TINY_LEARNING_RATE, step)
