"""GPT-2 (Radford et al. 2019), forward and backward, written out over a backend's operations.

The residual stream is a chain of fused steps: each norm first adds what the branch before it made, with the bias of the
branch's last product. The stream is kept after each branch: ``res_att[layer]`` behind the attention, ``res_mlp[layer]``
behind the MLP.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.spec import Array, Kernels, Weight
from llmc_cli.models.arena import ALIGN, Arena, Tokens
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.models.layout import parameter_shapes
from llmc_cli.rng import MersenneTwister

STD = 0.02  # of fresh weights

MATRICES = ("qkvw", "attprojw", "fcw", "fcprojw")

RECOMPUTED = ((), ("gelu",), ("gelu", "ln1", "ln2"))
"""By level: what the backward pass computes again instead of finding it kept (the C trainer's levels)."""


def activation_shapes(config: ModelConfig, B: int, T: int, recompute: int = 0) -> dict[str, tuple[int, ...]]:
    """What the forward pass keeps for the backward pass; of what is computed again, one layer's worth."""
    L, C, N = config.num_layers, config.channels, B * T
    shapes: dict[str, tuple[int, ...]] = {
        "encoded": (N, C),
        "ln1": (L, N, C),
        "qkv": (L, B, T, 3 * C),
        "att": (L, B, T, C),
        "res_att": (L, N, C),
        "ln2": (L, N, C),
        "fc": (L, N, 4 * C),
        "gelu": (L, N, 4 * C),
        "res_mlp": (L, N, C),
        "lnf": (N, C),
        "branch": (N, C),
    }
    return {name: (1, *shape[1:]) if name in RECOMPUTED[recompute] else shape for name, shape in shapes.items()}


def statistic_shapes(config: ModelConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    """What the forward pass keeps beside them, in the parameters' precision whatever that of activations."""
    L, NH, N = config.num_layers, config.num_heads, B * T
    shapes: dict[str, tuple[int, ...]] = {"lse": (L, B, NH, T)}
    for name in ("ln1", "ln2"):
        shapes |= {f"{name}_mean": (L, N), f"{name}_rstd": (L, N)}
    return {**shapes, "lnf_mean": (N,), "lnf_rstd": (N,), "losses": (N,)}


def gradient_shapes(config: ModelConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    """Scratch that the backward pass uses again in every layer. Other gradients take the place of activations."""
    C, N = config.channels, B * T
    return {"dres": (N, C), "dbranch": (N, C)}


class GPT2:
    """A model: its parameters, and on demand the memory to train it.

    The parameters live in one arena in the order of a model file. ``prepare`` makes the rest once; after that neither
    ``forward`` nor ``backward`` allocates.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        self.config, self.kernels = config, kernels
        self.params = Arena(kernels.alloc, parameter_shapes(config), kernels.dtype)
        self.head: Weight = kernels.bind(self.params["wte"])
        self.weights: dict[str, list[Weight]] = {
            name: [kernels.bind(layer) for layer in self.params[name]] for name in MATRICES
        }

    def publish(self) -> None:
        """Tell the backend that the parameters have changed."""
        self.kernels.publish([self.head, *(weight for name in MATRICES for weight in self.weights[name])])

    def prepare(self, B: int, T: int, train: bool = True, recompute: int = 0) -> None:
        """Allocate the activations of a batch (B,T), T ≤ max_seq_len, and with ``train`` the gradients.

        ``recompute`` trades memory for time, by the levels of ``RECOMPUTED``; the results have the same bits.
        """
        alloc, dtype, config = self.kernels.alloc, self.kernels.activation_dtype, self.config
        self.B, self.T, self.recomputed = B, T, RECOMPUTED[recompute]
        self._recorded: dict[tuple[object, ...], Callable[[], None]] = {}
        self._prefetched: tuple[Tokens, Tokens] | None = None
        self.ids, self.targets, self.positions = (alloc((B * T,), np.int32) for _ in range(3))
        self.kernels.upload(self.positions, np.tile(np.arange(T, dtype=np.int32), B))
        self.acts = Arena(alloc, activation_shapes(config, B, T, recompute), dtype, ALIGN)
        self.stats = Arena(alloc, statistic_shapes(config, B, T), self.kernels.dtype, ALIGN)
        if train:
            self.grads = Arena(alloc, parameter_shapes(config), self.kernels.dtype)
            self.scratch = Arena(alloc, gradient_shapes(config, B, T), dtype, ALIGN)

    @staticmethod
    def rows(x: Array) -> Array:
        """(B,T,K) as (N,K)."""
        return x.reshape(-1, x.shape[-1])

    def act(self, name: str, layer: int) -> Array:
        """The activation of a layer; where it is computed again, every layer's in turn is kept in one place."""
        kept = self.acts[name]
        return kept[layer % len(kept)]

    def _run(self, method: Callable[..., None], *arguments: object) -> None:
        """``method`` of this class with these arguments, recorded: so it must not bring anything from the host."""
        key = (self.kernels, method, *arguments)
        if key not in self._recorded:
            model = weakref.proxy(self)  # else the two would hold each other, and the memory of both
            self._recorded[key] = self.kernels.record(lambda: method(model, *arguments))
        self._recorded[key]()

    def prefetch(self, ids: Tokens, targets: Tokens) -> None:
        """Start uploading the next batch (B,T) while the device may still be computing the current one.

        The next ``forward`` and ``backward`` use the upload if they are called with these same arrays, which must not
        be modified until then.
        """
        self.kernels.upload_async(self.ids, ids.reshape(-1))
        self.kernels.upload_async(self.targets, targets.reshape(-1))
        self._prefetched = ids, targets

    def forward(self, ids: Tokens) -> None:
        """The hidden states ``acts["lnf"]`` (N,C) of ids (B,T) on the host."""
        if self._prefetched is None or self._prefetched[0] is not ids:
            self._prefetched = None
            self.kernels.upload(self.ids, ids.reshape(-1))  # read again by backward
        self._run(GPT2._forward)

    def _forward(self) -> None:
        k, p, a, st, eps = self.kernels, self.params, self.acts, self.stats, self.config.norm_eps
        k.embedding_forward(a["encoded"], p["wte"], p["wpe"], self.ids, self.positions)
        stream, delta, bias, branch = a["encoded"], None, None, a["branch"]
        for layer in range(self.config.num_layers):
            # the stream after this norm's addition is the one that the layer before has room for
            res = a["res_mlp"][layer - 1] if layer else stream
            k.residual_norm_forward(
                res,
                self.act("ln1", layer),
                st["ln1_mean"][layer],
                st["ln1_rstd"][layer],
                stream,
                delta,
                bias,
                p["ln1w"][layer],
                p["ln1b"][layer],
                eps,
            )
            k.linear_forward(
                self.rows(a["qkv"][layer]), self.act("ln1", layer), self.weights["qkvw"][layer], p["qkvb"][layer]
            )
            k.attention_forward(a["att"][layer], st["lse"][layer], a["qkv"][layer], self.config.num_heads)
            k.linear_forward(branch, self.rows(a["att"][layer]), self.weights["attprojw"][layer], None)
            k.residual_norm_forward(
                a["res_att"][layer], self.act("ln2", layer), st["ln2_mean"][layer], st["ln2_rstd"][layer],
                res, branch, p["attprojb"][layer], p["ln2w"][layer], p["ln2b"][layer], eps,
            )  # fmt: skip
            k.linear_gelu_forward(
                self.act("gelu", layer),
                a["fc"][layer],
                self.act("ln2", layer),
                self.weights["fcw"][layer],
                p["fcb"][layer],
            )
            k.linear_forward(branch, self.act("gelu", layer), self.weights["fcprojw"][layer], None)
            stream, delta, bias = a["res_att"][layer], branch, p["fcprojb"][layer]
        k.residual_norm_forward(
            a["res_mlp"][-1], a["lnf"], st["lnf_mean"], st["lnf_rstd"],
            stream, delta, bias, p["lnfw"], p["lnfb"], eps,
        )  # fmt: skip

    def compute_losses(self, targets: Tokens) -> NDArray[np.floating]:
        """After ``forward``: return ``losses`` of targets (B,T) without computing gradients."""
        self._prefetched = None
        self.kernels.upload(self.targets, targets.reshape(-1))
        self._run(GPT2._compute_losses)
        return self.losses()

    def losses(self) -> NDArray[np.floating]:
        """Wait for the device and return the losses (N,) of the last ``backward`` or ``compute_losses``.

        The loss of an ignored target (-1) is 0. The next call may overwrite the array.
        """
        return self.kernels.download(self.stats["losses"])

    def _compute_losses(self) -> None:
        V = self.config.vocab_size
        self.kernels.head_loss(
            self.stats["losses"], None, None, self.acts["lnf"], self.head, self.targets, V, 0.0, False
        )

    def backward(self, targets: Tokens, dloss: float, acc: bool) -> None:
        """After ``forward``: launch the computation of ``losses`` of targets (B,T), -1 ignored, and of their gradients.

        ``grads`` becomes dloss times the gradient of the sum of the losses; with ``acc`` that is added to it. The
        gradients of ``gelu`` and ``qkv`` overwrite these activations, so each ``forward`` allows one call.
        """
        if self._prefetched is None or self._prefetched[1] is not targets:
            self.kernels.upload(self.targets, targets.reshape(-1))
        self._prefetched = None
        self._run(GPT2._backward, dloss, acc)

    def _backward(self, dloss: float, acc: bool) -> None:
        k, p, g, a, st = self.kernels, self.params, self.grads, self.acts, self.stats
        dres, dbranch, V = self.scratch["dres"], self.scratch["dbranch"], self.config.vocab_size
        k.head_loss(st["losses"], dbranch, g["wte"], a["lnf"], self.head, self.targets, V, dloss, acc)
        k.residual_norm_backward(
            dres, g["lnfw"], g["lnfb"],
            dbranch, a["res_mlp"][-1], st["lnf_mean"], st["lnf_rstd"], p["lnfw"], None, acc,
        )  # fmt: skip
        for layer in reversed(range(self.config.num_layers)):
            gelu, ln1, ln2 = (self.act(name, layer) for name in ("gelu", "ln1", "ln2"))
            res = a["res_mlp"][layer - 1] if layer else a["encoded"]
            self.compute_again(layer, res)
            # MLP branch: dres is the gradient of both the stream and the branch's output
            k.gelu_linear_backward(
                gelu, g["fcprojw"][layer], g["fcprojb"][layer],
                dres, gelu, a["fc"][layer], self.weights["fcprojw"][layer], acc,
            )  # fmt: skip
            k.linear_backward(dbranch, g["fcw"][layer], g["fcb"][layer], gelu, ln2, self.weights["fcw"][layer], acc)
            k.residual_norm_backward(
                dres, g["ln2w"][layer], g["ln2b"][layer],
                dbranch, a["res_att"][layer], st["ln2_mean"][layer], st["ln2_rstd"][layer], p["ln2w"][layer], dres, acc,
            )  # fmt: skip
            # attention branch
            k.linear_backward(
                dbranch, g["attprojw"][layer], g["attprojb"][layer],
                dres, self.rows(a["att"][layer]), self.weights["attprojw"][layer], acc,
            )  # fmt: skip
            dout = dbranch.reshape(a["att"][layer].shape)  # (B, T, C)
            k.attention_backward(
                a["qkv"][layer], dout, a["att"][layer], st["lse"][layer], a["qkv"][layer], self.config.num_heads
            )
            k.linear_backward(
                dbranch, g["qkvw"][layer], g["qkvb"][layer],
                self.rows(a["qkv"][layer]), ln1, self.weights["qkvw"][layer], acc,
            )  # fmt: skip
            k.residual_norm_backward(
                dres, g["ln1w"][layer], g["ln1b"][layer],
                dbranch, res, st["ln1_mean"][layer], st["ln1_rstd"][layer], p["ln1w"][layer], dres, acc,
            )  # fmt: skip
        k.embedding_backward(g["wte"], g["wpe"], dres, self.ids, self.positions, acc)

    def compute_again(self, layer: int, res: Array) -> None:
        """Put back what the backward pass of ``layer`` needs and was not kept; ``res`` (N,C): the stream before it."""
        if layer == self.config.num_layers - 1:
            return  # the last that the forward pass left
        k, p, a, st, eps = self.kernels, self.params, self.acts, self.stats, self.config.norm_eps
        if "gelu" in self.recomputed:
            k.gelu_forward(self.act("gelu", layer), a["fc"][layer])
        for name, stream in (("ln1", res), ("ln2", a["res_att"][layer])):
            if name in self.recomputed:
                k.residual_norm_forward(
                    stream, self.act(name, layer), st[f"{name}_mean"][layer], st[f"{name}_rstd"][layer],
                    stream, None, None, p[f"{name}w"][layer], p[f"{name}b"][layer], eps,
                )  # fmt: skip

    def logits(self, rows: slice) -> NDArray[np.floating]:
        """After ``forward``: the logits (R,V) of a range of the N rows, in memory of their own."""
        hidden = self.acts["lnf"][rows]
        logits = self.kernels.alloc((len(hidden), self.config.vocab_size), self.kernels.dtype)
        self.kernels.head_logits(logits, hidden, self.head)
        return self.kernels.download(logits)

    @contextlib.contextmanager
    def fill(self) -> Iterator[Arena]:
        """The parameters in float32 on the host, all to be overwritten; they are the model's when the block ends. What
        they are before is not brought here."""
        flat = self.params.flat
        if not isinstance(flat, np.ndarray) or flat.dtype != np.float32:
            flat = np.zeros(flat.size, np.float32)
        yield Arena(lambda *_: flat, parameter_shapes(self.config), np.float32)
        self.kernels.upload(self.params.flat, flat)
        self.publish()

    def host_params(self) -> Arena:
        """The parameters as they are, on the host: to be read only."""
        flat = self.kernels.download(self.params.flat)
        return Arena(lambda *_: flat, parameter_shapes(self.config), flat.dtype)

    def extend(self, cache: KVCache, ids: Tokens) -> Array:
        """Feed ids (S,T), on the host, behind what ``cache`` holds; the hidden states (S,T,C) of the new positions, a
        view that the next call overwrites. The caller sees to it that the cache has room."""
        S, T = ids.shape
        cache.append(ids)
        return self.forward_cached(cache, T).reshape(S, T, -1)

    def forward_cached(self, cache: KVCache, T: int) -> Array:
        """What ``extend`` computes: the hidden states (S·T,C) of the T ids that each sequence of ``cache`` was last
        given. Nothing comes from the host or goes there."""
        k, p, eps, NH = self.kernels, self.params, self.config.norm_eps, self.config.num_heads
        S, C = cache.S, self.config.channels
        N = S * T
        a, st = cache.scratch(N), cache.statistics(N)
        lengths, ids, positions = cache.inputs(T)
        k.embedding_forward(a["stream"], p["wte"], p["wpe"], ids, positions)
        delta = bias = None
        for layer in range(self.config.num_layers):
            k.residual_norm_forward(
                a["stream"],
                a["norm"],
                st["mean"],
                st["rstd"],
                a["stream"],
                delta,
                bias,
                p["ln1w"][layer],
                p["ln1b"][layer],
                eps,
            )
            k.linear_forward(a["qkv"], a["norm"], self.weights["qkvw"][layer], p["qkvb"][layer])
            out, qkv = a["att"].reshape(S, T, C), a["qkv"].reshape(S, T, 3 * C)
            k.attention_cached(out, cache.keys[layer], cache.values[layer], qkv, lengths, NH)
            k.linear_forward(a["branch"], a["att"], self.weights["attprojw"][layer], None)
            k.residual_norm_forward(
                a["stream"],
                a["norm"],
                st["mean"],
                st["rstd"],
                a["stream"],
                a["branch"],
                p["attprojb"][layer],
                p["ln2w"][layer],
                p["ln2b"][layer],
                eps,
            )
            k.linear_gelu_forward(a["gelu"], a["fc"], a["norm"], self.weights["fcw"][layer], p["fcb"][layer])
            k.linear_forward(a["branch"], a["gelu"], self.weights["fcprojw"][layer], None)
            delta, bias = a["branch"], p["fcprojb"][layer]
        k.residual_norm_forward(
            a["stream"], a["norm"], st["mean"], st["rstd"], a["stream"], delta, bias, p["lnfw"], p["lnfb"], eps
        )
        return a["norm"]


def initialize(model: GPT2, seed: int, threads: int = 1) -> None:
    """Fresh weights, the same as PyTorch's for the same seed to float rounding.

    One stream of normals: wte (its V rows), wpe, then layer by layer the four matrices; standard deviation 0.02, of
    the two projections into the stream divided by sqrt(2L) (Radford et al. 2019). Norm weights are 1, the rest is 0.
    """
    generator, config = MersenneTwister(seed), model.config
    with model.fill() as p:
        p.flat[:] = 0
        for name in ("ln1w", "ln2w", "lnfw"):
            p[name][:] = 1
        generator.fill_normal(p["wte"][: config.vocab_size].reshape(-1), STD, threads)
        generator.fill_normal(p["wpe"].reshape(-1), STD, threads)
        for layer in range(config.num_layers):
            for name in MATRICES:
                scale = (2 * config.num_layers) ** -0.5 if name.endswith("projw") else 1.0
                generator.fill_normal(p[name][layer].reshape(-1), STD * scale, threads)
