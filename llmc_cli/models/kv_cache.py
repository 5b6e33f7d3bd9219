"""The KV cache, and the scratch buffers of decoding."""

import numpy as np

from llmc_cli.kernels.spec import Array, Kernels
from llmc_cli.models.activations import Activations, LayerActivations
from llmc_cli.models.arena import ALIGN, Arena, Tokens
from llmc_cli.models.config import ModelConfig


def cache_shapes(config: ModelConfig, S: int, T: int) -> dict[str, tuple[int, ...]]:
    """Keys and values of S sequences of up to T positions."""
    shape = (config.num_layers, S, config.num_heads, T, config.head_size)
    return {"keys": shape, "values": shape}


class KVCache:
    """Keys and values of S sequences of up to T positions, and scratch for forward passes of at most R rows.

    ``lengths`` (S,) int32, on the host, is the number of positions stored for each sequence.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels, S: int, T: int, R: int) -> None:
        self.config, self.kernels, C = config, kernels, config.channels
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
        self._activations: dict[int, Activations] = {}

    def activations(self, T: int) -> Activations:
        """Return the scratch for T positions of each sequence. All layers share it, and the norms share a buffer."""
        if T not in self._activations:
            S, N, C = self.S, self.S * T, self.config.channels
            scratch = {name: view[:N] for name, view in self._scratch.items()}
            mean, rstd = self._statistics["mean"][:N], self._statistics["rstd"][:N]
            stream, norm = scratch["stream"], scratch["norm"]
            layer = LayerActivations(
                stream, norm, mean, rstd,
                scratch["qkv"].reshape(S, T, 3 * C), scratch["qkv"], scratch["att"].reshape(S, T, C), scratch["att"],
                stream, norm, mean, rstd, scratch["fc"], scratch["gelu"],
            )  # fmt: skip
            layers = [layer] * self.config.num_layers
            self._activations[T] = Activations(layers, scratch["branch"], stream, norm, mean, rstd)
        return self._activations[T]

    def append(self, ids: Tokens) -> None:
        """Upload the next ids (S,T) with lengths and positions, as one copy, and advance ``lengths`` by T."""
        S, T = ids.shape
        positions = self.lengths[:, None] + np.arange(T, dtype=np.int32)  # (S, T)
        values = np.concatenate([self.lengths, ids.reshape(-1), positions.reshape(-1)])
        self.kernels.upload(self._inputs[: S + 2 * S * T], values)
        self.lengths += T

    def inputs(self, T: int) -> tuple[Array, Array, Array]:
        """Return the last upload of T ids per sequence: lengths (S,) before them, ids (S·T,) and positions (S·T,)."""
        S, N = self.S, self.S * T
        return self._inputs[:S], self._inputs[S : S + N], self._inputs[S + N : S + 2 * N]

    def copy_prompt(self, prompt: "KVCache") -> None:
        """Start every sequence with the contents of ``prompt``, a cache of one sequence."""
        used = int(prompt.lengths[0])
        for target, source in ((self.keys, prompt.keys), (self.values, prompt.values)):  # (L, S, NH, T, HS)
            for target_layer, source_layer in zip(target, source, strict=True):
                for sequence in target_layer:
                    for target_head, source_head in zip(sequence, source_layer[0], strict=True):
                        self.kernels.copy(target_head[:used], source_head[:used])
        self.lengths[:] = used
