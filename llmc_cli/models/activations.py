"""Activation buffers of GPT-2: shapes for training, and the views that a forward pass writes to."""

from typing import NamedTuple

from llmc_cli.kernels.spec import Array
from llmc_cli.models.arena import Arena
from llmc_cli.models.config import ModelConfig

RECOMPUTED = ((), ("gelu",), ("gelu", "ln1", "ln2"))
"""By recomputation level, as in llm.c: the activations that the backward pass computes again."""


class LayerActivations(NamedTuple):
    """The outputs of one layer. For inference all layers can share the same buffers."""

    res: Array  # (N, C) residual stream at the layer's input
    ln1: Array  # (N, C)
    ln1_mean: Array  # (N,)
    ln1_rstd: Array  # (N,)
    qkv: Array  # (B, T, 3C)
    qkv_rows: Array  # (N, 3C) view of ``qkv``
    att: Array  # (B, T, C)
    att_rows: Array  # (N, C) view of ``att``
    res_att: Array  # (N, C) residual stream after attention; may be ``res``
    ln2: Array  # (N, C)
    ln2_mean: Array  # (N,)
    ln2_rstd: Array  # (N,)
    fc: Array  # (N, 4C)
    gelu: Array  # (N, 4C)


class Activations(NamedTuple):
    """The outputs of a forward pass. The embedding is written to ``layers[0].res``."""

    layers: list[LayerActivations]
    branch: Array  # (N, C) output of the latest attention or MLP branch
    res_final: Array  # (N, C) residual stream after the last layer
    lnf: Array  # (N, C)
    lnf_mean: Array  # (N,)
    lnf_rstd: Array  # (N,)


def activation_shapes(config: ModelConfig, B: int, T: int, recompute: int = 0) -> dict[str, tuple[int, ...]]:
    """Activations stored for the backward pass. Recomputed activations share one layer's buffer."""
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
    """Norm statistics, attention's log-sum-exp and losses, in the dtype of the parameters."""
    L, NH, N = config.num_layers, config.num_heads, B * T
    shapes: dict[str, tuple[int, ...]] = {"lse": (L, B, NH, T)}
    for name in ("ln1", "ln2"):
        shapes |= {f"{name}_mean": (L, N), f"{name}_rstd": (L, N)}
    return {**shapes, "lnf_mean": (N,), "lnf_rstd": (N,), "losses": (N,)}


def gradient_shapes(config: ModelConfig, B: int, T: int) -> dict[str, tuple[int, ...]]:
    """Scratch of the backward pass, shared by all layers. Other gradients overwrite activations."""
    C, N = config.channels, B * T
    return {"dres": (N, C), "dbranch": (N, C)}


def training_activations(acts: Arena, stats: Arena) -> Activations:
    """Views into arenas of ``activation_shapes`` and ``statistic_shapes``, layer by layer."""

    def layer_view(name: str, layer: int) -> Array:
        return acts[name][layer % len(acts[name])]  # recomputed activations have one buffer for all layers

    def rows(x: Array) -> Array:  # (B, T, K) to (N, K)
        return x.reshape(-1, x.shape[-1])

    def layer_activations(layer: int) -> LayerActivations:
        return LayerActivations(
            res=acts["res_mlp"][layer - 1] if layer else acts["encoded"],
            ln1=layer_view("ln1", layer),
            ln1_mean=stats["ln1_mean"][layer],
            ln1_rstd=stats["ln1_rstd"][layer],
            qkv=acts["qkv"][layer],
            qkv_rows=rows(acts["qkv"][layer]),
            att=acts["att"][layer],
            att_rows=rows(acts["att"][layer]),
            res_att=acts["res_att"][layer],
            ln2=layer_view("ln2", layer),
            ln2_mean=stats["ln2_mean"][layer],
            ln2_rstd=stats["ln2_rstd"][layer],
            fc=acts["fc"][layer],
            gelu=layer_view("gelu", layer),
        )

    layers = [layer_activations(layer) for layer in range(len(acts["qkv"]))]
    return Activations(layers, acts["branch"], acts["res_mlp"][-1], acts["lnf"], stats["lnf_mean"], stats["lnf_rstd"])
