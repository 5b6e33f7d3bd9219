"""Error bounds of model checks, for each precision."""

from typing import NamedTuple


class Bounds(NamedTuple):
    """The error bounds for one precision of matrix products."""

    tensor: float
    """On max|error| / max|reference| of logits, loss and each gradient."""
    loss: float
    """On the relative error of the loss after updates; AdamW amplifies the errors of small gradients."""
    tiny_loss: float
    """The same for the tiny model."""


BOUNDS = {
    "fp32": Bounds(2e-5, 1e-4, 1e-5),
    "bf16x3": Bounds(1e-4, 1e-4, 2e-5),
    "tf32": Bounds(3e-3, 1e-3, 2e-4),
    "bf16": Bounds(2e-2, 5e-3, 1e-3),
}
"""Bounds by precision.

fp32: the bound is relative to the largest element of a tensor, so that smaller errors are not detected even in small
elements. A flipped bit 30 of any element is detected if max|reference| < 1e5: it changes a value below 2 to 2 or more,
infinity or NaN, and any other value to almost 0, which is an error of at least 2.

bf16: the bound is twice the error of PyTorch's autocast. With it, newly initialized GPT-2 models of 2, 6 and 12 layers
have errors of 0.8e-2 to 1.1e-2 in the logits, about 1e-2 in most gradients and 1.8e-2 in the worst (against float64;
PyTorch 2.13 on a CPU with AMX)."""

STEPS = 10  # AdamW steps of the tiny model
