"""AdamW."""

import math

import numpy as np

from llmc_cli.kernels.spec import Array
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.layout import DECAYED


class AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with clipping; only the ``decayed`` tensors decay.

    The moments ``m`` and ``v`` are flat arrays (P,) in the order of the parameter arena, as in a training state.
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
        segments = [(params.offsets[name], math.prod(view.shape), name in decayed) for name, view in params.items()]
        self.segments = kernels.alloc((len(params), 3), np.int64)
        kernels.upload(self.segments, np.array(segments, np.int64))
        self.settings = np.array([0, beta1, beta2, eps, weight_decay, 1, 1, max_norm])
        self.hyper = kernels.alloc(self.settings.shape, np.float64)
        self.sumsq = kernels.alloc((1,), np.float64)

    def gradient_norm(self) -> float:
        """Return the global norm of the gradients, by which the next ``step`` clips."""
        return math.sqrt(self._sum_squares(self.model.grads.flat))

    def is_finite(self) -> bool:
        """Return whether all parameters and moments are finite. Overwrites the result of ``gradient_norm``."""
        return all(math.isfinite(self._sum_squares(array)) for array in (self.model.params.flat, self.m, self.v))

    def _sum_squares(self, array: Array) -> float:
        self.model.kernels.sum_squares(self.sumsq, array)
        return float(self.model.kernels.download(self.sumsq)[0])

    def step(self, lr: float, t: int) -> None:
        """Do the t-th update, t = 1, 2, …; call ``gradient_norm`` before it."""
        self.settings[0] = lr
        self.settings[5] = 1 - self.beta1**t
        self.settings[6] = 1 - self.beta2**t
        kernels, model = self.model.kernels, self.model
        kernels.upload(self.hyper, self.settings)
        kernels.adamw(model.params.flat, self.m, self.v, model.grads.flat, self.segments, self.hyper, self.sumsq)
        self.model.publish()
