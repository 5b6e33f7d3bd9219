"""GPT-2 (Radford et al. 2019): forward and backward passes, written as calls of a backend's operations.

Each norm is fused with the residual addition before it: it adds the output of the previous branch, with the bias of
that branch's last linear layer, to the residual stream. The stream is stored after each branch: ``res_att[layer]``
after attention, ``res_mlp[layer]`` after the MLP.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.kernels.spec import Array, Kernels, Weight
from llmc_cli.models.activations import (
    RECOMPUTED,
    Activations,
    LayerActivations,
    activation_shapes,
    gradient_shapes,
    statistic_shapes,
    training_activations,
)
from llmc_cli.models.arena import ALIGN, Arena, Tokens
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.models.layout import MATRICES, parameter_shapes

Attention: TypeAlias = Callable[[int, LayerActivations], None]
"""Writes ``att`` from ``qkv`` for a layer, given its index."""


class GPT2:
    """The parameters of a model, and the buffers for training it.

    The parameters are stored in one arena, in the order of a model file. ``prepare`` allocates all other buffers; after
    that ``forward`` and ``backward`` allocate nothing.
    """

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        self.config, self.kernels = config, kernels
        self.params = Arena(kernels.alloc, parameter_shapes(config), kernels.dtype)
        self.head: Weight = kernels.bind(self.params["wte"])
        self.weights: dict[str, list[Weight]] = {
            name: [kernels.bind(layer) for layer in self.params[name]] for name in MATRICES
        }

    def publish(self) -> None:
        """Update the backend's form of the weights after the parameters have changed."""
        self.kernels.publish([self.head, *(weight for name in MATRICES for weight in self.weights[name])])

    def prepare(self, B: int, T: int, train: bool = True, recompute: int = 0) -> None:
        """Allocate the activations of a batch (B,T), T ≤ max_seq_len, and the gradients if ``train`` is set.

        ``recompute`` is a level of ``RECOMPUTED``. Higher levels save memory and take time; results are bitwise equal.
        """
        alloc, dtype, config = self.kernels.alloc, self.kernels.activation_dtype, self.config
        self.B, self.T, self.recomputed = B, T, RECOMPUTED[recompute]
        self._recorded: dict[tuple[object, ...], Callable[[], None]] = {}
        self._prefetched: tuple[Tokens, Tokens] | None = None
        self.ids, self.targets, self.positions = (alloc((B * T,), np.int32) for _ in range(3))
        self.kernels.upload(self.positions, np.tile(np.arange(T, dtype=np.int32), B))
        self.acts = Arena(alloc, activation_shapes(config, B, T, recompute), dtype, ALIGN)
        self.stats = Arena(alloc, statistic_shapes(config, B, T), self.kernels.dtype, ALIGN)
        self._activations = training_activations(self.acts, self.stats)
        if train:
            self.grads = Arena(alloc, parameter_shapes(config), self.kernels.dtype)
            self.scratch = Arena(alloc, gradient_shapes(config, B, T), dtype, ALIGN)

    def _run(self, method: Callable[..., None], *arguments: object) -> None:
        """Call a method of this class as recorded by ``Kernels.record``.

        It must not transfer data to or from the host.
        """
        key = (self.kernels, method, *arguments)
        if key not in self._recorded:
            model = weakref.proxy(self)  # a strong reference would be a cycle, which delays freeing the memory
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
        """Compute the hidden states ``acts["lnf"]`` (N,C) of ids (B,T), which are on the host."""
        if self._prefetched is None or self._prefetched[0] is not ids:
            self._prefetched = None
            self.kernels.upload(self.ids, ids.reshape(-1))  # also used by backward
        self._run(GPT2._forward)

    def _forward(self) -> None:
        k, lse, NH = self.kernels, self.stats["lse"], self.config.num_heads

        def attention(layer: int, a: LayerActivations) -> None:
            k.attention_forward(a.att, lse[layer], a.qkv, NH)

        self._forward_layers(self._activations, self.ids, self.positions, attention)

    def _forward_layers(self, acts: Activations, ids: Array, positions: Array, attention: Attention) -> None:
        """The forward pass of training and of decoding; they differ in buffers and attention."""
        k, p, weights, eps = self.kernels, self.params, self.weights, self.config.norm_eps
        stream, delta, bias, branch = acts.layers[0].res, None, None, acts.branch
        k.embedding_forward(stream, p["wte"], p["wpe"], ids, positions)
        for layer, a in enumerate(acts.layers):
            k.residual_norm_forward(
                a.res, a.ln1, a.ln1_mean, a.ln1_rstd, stream, delta, bias, p["ln1w"][layer], p["ln1b"][layer], eps
            )
            k.linear_forward(a.qkv_rows, a.ln1, weights["qkvw"][layer], p["qkvb"][layer])
            attention(layer, a)
            k.linear_forward(branch, a.att_rows, weights["attprojw"][layer], None)
            k.residual_norm_forward(
                a.res_att, a.ln2, a.ln2_mean, a.ln2_rstd,
                a.res, branch, p["attprojb"][layer], p["ln2w"][layer], p["ln2b"][layer], eps,
            )  # fmt: skip
            k.linear_gelu_forward(a.gelu, a.fc, a.ln2, weights["fcw"][layer], p["fcb"][layer])
            k.linear_forward(branch, a.gelu, weights["fcprojw"][layer], None)
            stream, delta, bias = a.res_att, branch, p["fcprojb"][layer]
        k.residual_norm_forward(
            acts.res_final, acts.lnf, acts.lnf_mean, acts.lnf_rstd, stream, delta, bias, p["lnfw"], p["lnfb"], eps
        )

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
        k, p, g, weights, acts = self.kernels, self.params, self.grads, self.weights, self._activations
        dres, dbranch, losses = self.scratch["dres"], self.scratch["dbranch"], self.stats["losses"]
        V, NH = self.config.vocab_size, self.config.num_heads
        k.head_loss(losses, dbranch, g["wte"], acts.lnf, self.head, self.targets, V, dloss, acc)
        k.residual_norm_backward(
            dres, g["lnfw"], g["lnfb"],
            dbranch, acts.res_final, acts.lnf_mean, acts.lnf_rstd, p["lnfw"], None, acc,
        )  # fmt: skip
        for layer in reversed(range(self.config.num_layers)):
            a = acts.layers[layer]
            self._recompute(layer, a)
            # MLP branch: dres is the gradient of both the residual stream and the branch's output
            k.gelu_linear_backward(
                a.gelu, g["fcprojw"][layer], g["fcprojb"][layer], dres, a.gelu, a.fc, weights["fcprojw"][layer], acc
            )
            k.linear_backward(dbranch, g["fcw"][layer], g["fcb"][layer], a.gelu, a.ln2, weights["fcw"][layer], acc)
            k.residual_norm_backward(
                dres, g["ln2w"][layer], g["ln2b"][layer],
                dbranch, a.res_att, a.ln2_mean, a.ln2_rstd, p["ln2w"][layer], dres, acc,
            )  # fmt: skip
            # attention branch
            k.linear_backward(
                dbranch, g["attprojw"][layer], g["attprojb"][layer],
                dres, a.att_rows, weights["attprojw"][layer], acc,
            )  # fmt: skip
            dout = dbranch.reshape(a.att.shape)  # (B, T, C)
            k.attention_backward(a.qkv, dout, a.att, self.stats["lse"][layer], a.qkv, NH)
            k.linear_backward(
                dbranch, g["qkvw"][layer], g["qkvb"][layer], a.qkv_rows, a.ln1, weights["qkvw"][layer], acc
            )
            k.residual_norm_backward(
                dres, g["ln1w"][layer], g["ln1b"][layer],
                dbranch, a.res, a.ln1_mean, a.ln1_rstd, p["ln1w"][layer], dres, acc,
            )  # fmt: skip
        k.embedding_backward(g["wte"], g["wpe"], dres, self.ids, self.positions, acc)

    def _recompute(self, layer: int, a: LayerActivations) -> None:
        """Recompute the activations of ``layer`` that were overwritten by later layers."""
        if layer == self.config.num_layers - 1:
            return
        k, p, eps = self.kernels, self.params, self.config.norm_eps
        if "gelu" in self.recomputed:
            k.gelu_forward(a.gelu, a.fc)
        for name, stream, y, mean, rstd in (
            ("ln1", a.res, a.ln1, a.ln1_mean, a.ln1_rstd),
            ("ln2", a.res_att, a.ln2, a.ln2_mean, a.ln2_rstd),
        ):
            if name in self.recomputed:
                k.residual_norm_forward(
                    stream, y, mean, rstd, stream, None, None, p[f"{name}w"][layer], p[f"{name}b"][layer], eps
                )

    def logits(self, rows: slice) -> NDArray[np.floating]:
        """After ``forward``: return the logits (R,V) of a range of the N rows, in a new array."""
        hidden = self.acts["lnf"][rows]
        logits = self.kernels.alloc((len(hidden), self.config.vocab_size), self.kernels.dtype)
        self.kernels.head_logits(logits, hidden, self.head)
        return self.kernels.download(logits)

    @contextlib.contextmanager
    def overwrite_params(self) -> Iterator[Arena]:
        """Yield an arena of float32 parameters on the host, all of which must be overwritten.

        At the end of the block they are uploaded and published. The previous values are not downloaded.
        """
        flat = self.params.flat
        if not isinstance(flat, np.ndarray) or flat.dtype != np.float32:
            flat = np.zeros(flat.size, np.float32)
        yield Arena(lambda *_: flat, parameter_shapes(self.config), np.float32)
        self.kernels.upload(self.params.flat, flat)
        self.publish()

    def host_params(self) -> Arena:
        """Return the parameters on the host, in their own dtype. They must not be modified."""
        flat = self.kernels.download(self.params.flat)
        return Arena(lambda *_: flat, parameter_shapes(self.config), flat.dtype)

    def extend(self, cache: KVCache, ids: Tokens) -> Array:
        """Append ids (S,T), which are on the host, to ``cache``, which must have room for them.

        Returns the hidden states (S,T,C) of the new positions. The next call overwrites them.
        """
        S, T = ids.shape
        cache.append(ids)
        return self.forward_cached(cache, T).reshape(S, T, -1)

    def forward_cached(self, cache: KVCache, T: int) -> Array:
        """Return the hidden states (S·T,C) of the last T ids appended to each sequence, and cache keys and values.

        Transfers nothing to or from the host, so that it can be recorded. The next call overwrites the hidden states.
        """
        k, NH, acts = self.kernels, self.config.num_heads, cache.activations(T)
        lengths, ids, positions = cache.inputs(T)

        def attention(layer: int, a: LayerActivations) -> None:
            k.attention_cached(a.att, cache.keys[layer], cache.values[layer], a.qkv, lengths, NH)

        self._forward_layers(acts, ids, positions, attention)
        return acts.lnf
