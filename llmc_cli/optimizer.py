"""AdamW over the parameter arena."""

import math

import numpy as np

from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.layout import DECAYED


class AdamW:
    """Moments and the update (Loshchilov and Hutter 2019, arXiv:1711.05101), decay on the named tensors only.

    ``m`` and ``v`` are flat (P,) arrays in the order of the parameter arena, where a training state keeps them.
    """

    def __init__(
        self,
        model: GPT2,
        beta1: float = 0.9,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
        decayed: tuple[str, ...] = DECAYED,
    ) -> None:
        kernels, params = model.kernels, model.params
        self.model, self.beta1, self.beta2 = model, beta1, beta2
        self.m = kernels.alloc(params.flat.shape, kernels.dtype)
        self.v = kernels.alloc(params.flat.shape, kernels.dtype)
        self.segments = kernels.alloc((len(params), 3), np.int64)
        for row, (name, view) in enumerate(params.items()):
            self.segments[row] = params.offsets[name], math.prod(view.shape), name in decayed
        self.hyper = kernels.alloc((8,), np.float64)
        self.hyper[:] = 0, beta1, beta2, eps, weight_decay, 1, 1, max_norm
        self.sumsq = kernels.alloc((1,), np.float64)

    def gradient_norm(self) -> float:
        """The global norm of the gradients; ``step`` clips by it."""
        self.model.kernels.sum_squares(self.sumsq, self.model.grads.flat)
        return math.sqrt(float(self.sumsq[0]))

    def is_finite(self) -> bool:
        """Whether parameters and moments all are: from others no training could go on. Takes the place of the norm."""
        kernels = self.model.kernels
        for array in (self.model.params.flat, self.m, self.v):
            kernels.sum_squares(self.sumsq, array)
            if not math.isfinite(float(self.sumsq[0])):
                return False
        return True

    def step(self, lr: float, t: int) -> None:
        """The t-th update, t = 1, 2, …, after ``gradient_norm``."""
        self.hyper[0] = lr
        self.hyper[5] = 1 - self.beta1**t
        self.hyper[6] = 1 - self.beta2**t
        self.model.kernels.adamw(
            self.model.params.flat, self.m, self.v, self.model.grads.flat, self.segments, self.hyper, self.sumsq
        )
        self.model.publish()
