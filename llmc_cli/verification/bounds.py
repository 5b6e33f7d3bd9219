"""Error bounds of model checks."""

from typing import NamedTuple


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
