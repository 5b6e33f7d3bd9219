"""What tokens are sampled with: keys and values of the positions so far, and memory for the rows to come."""

import numpy as np

from llmc_cli.kernels.spec import Array, Kernels
from llmc_cli.models.arena import ALIGN, Arena, Tokens
from llmc_cli.models.config import ModelConfig


def cache_shapes(config: ModelConfig, S: int, T: int) -> dict[str, tuple[int, ...]]:
    """Keys and values of S sequences of up to T positions."""
    shape = (config.num_layers, S, config.num_heads, T, config.head_size)
    return {"keys": shape, "values": shape}


class KVCache:
    """Keys and values of S sequences of up to T positions, and the scratch to add at most R rows at once.

    ``lengths`` (S,) int32, on the host, is how many positions of each are filled.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, S: int, T: int, R: int) -> None:
        self.kernels, C = kernels, config.channels
        alloc, dtype = kernels.alloc, kernels.activation_dtype
        self.S, self.T = S, T
        arena = Arena(alloc, cache_shapes(config, S, T), dtype, ALIGN)
        self.keys, self.values = arena["keys"], arena["values"]
        self.lengths = np.zeros(S, np.int32)
        shapes = {"stream": (R, C), "norm": (R, C), "qkv": (R, 3 * C), "att": (R, C), "branch": (R, C),
                  "fc": (R, 4 * C), "gelu": (R, 4 * C)}  # fmt: skip
        self._scratch = Arena(alloc, shapes, dtype, ALIGN)
        self._statistics = Arena(alloc, {"mean": (R,), "rstd": (R,)}, kernels.dtype, ALIGN)
        self._inputs = alloc((S + 2 * R,), np.int32)

    def scratch(self, N: int) -> dict[str, Array]:
        """The first N rows of each scratch array."""
        return {name: view[:N] for name, view in self._scratch.items()}

    def statistics(self, N: int) -> dict[str, Array]:
        """The same of ``mean`` and ``rstd`` (N,)."""
        return {name: view[:N] for name, view in self._statistics.items()}

    def append(self, ids: Tokens) -> None:
        """Give the backend the next ids (S,T), in one piece with where they stand, and count them as filled."""
        S, T = ids.shape
        positions = self.lengths[:, None] + np.arange(T, dtype=np.int32)  # (S, T)
        values = np.concatenate([self.lengths, ids.reshape(-1), positions.reshape(-1)])
        self.kernels.upload(self._inputs[: S + 2 * S * T], values)
        self.lengths += T

    def inputs(self, T: int) -> tuple[Array, Array, Array]:
        """What ``append`` gave of T ids for each sequence: the lengths (S,) before them, ids (S·T,), positions
        (S·T,)."""
        S, N = self.S, self.S * T
        return self._inputs[:S], self._inputs[S : S + N], self._inputs[S + N : S + 2 * N]

    def copy_prompt(self, first: "KVCache") -> None:
        """Let every sequence begin with what ``first``, a cache of one, holds."""
        used = int(first.lengths[0])
        for mine, source in ((self.keys, first.keys), (self.values, first.values)):  # (L, S, NH, T, HS)
            for layer, heads in zip(mine, source, strict=True):
                for sequence in layer:
                    for to, held in zip(sequence, heads[0], strict=True):
                        self.kernels.copy(to[:used], held[:used])
        self.lengths[:] = used
