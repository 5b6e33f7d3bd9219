"""Convert between GPT-2's parameters and the tensors of Hugging Face transformers.

transformers stores one tensor per layer, and linear weights as (in, out), the transpose of the layout here (its class
Conv1D). The head is tied to the embedding, but a file may store it as well. Names start with ``transformer.`` if the
model was saved with its head.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import DataError
from llmc_cli.formats.stream import FLOATS
from llmc_cli.formats.tensors import Tensors
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.layout import parameter_shapes

Arrays = Mapping[str, NDArray[np.float32]]

PREFIX = "transformer."
HEAD = "lm_head.weight"
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
"""Buffers of older versions: the causal mask and the value of masked scores. They are ignored."""

OUTSIDE_LAYERS = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
IN_LAYERS = {
    "ln1w": "ln_1.weight",
    "ln1b": "ln_1.bias",
    "qkvw": "attn.c_attn.weight",
    "qkvb": "attn.c_attn.bias",
    "attprojw": "attn.c_proj.weight",
    "attprojb": "attn.c_proj.bias",
    "ln2w": "ln_2.weight",
    "ln2b": "ln_2.bias",
    "fcw": "mlp.c_fc.weight",
    "fcb": "mlp.c_fc.bias",
    "fcprojw": "mlp.c_proj.weight",
    "fcprojb": "mlp.c_proj.bias",
}
CONV1D = ("qkvw", "attprojw", "fcw", "fcprojw")

MAX_NAMES = 3  # listed in an error message


class Target(NamedTuple):
    """The parameter, or the layer of it, that corresponds to a tensor of transformers."""

    name: str
    layer: int | None  # None: the whole parameter

    def view(self, params: Arrays, config: ModelConfig) -> NDArray[np.float32]:
        """Return the corresponding view of ``params``, without the padding of the vocabulary."""
        if self.name == "wte":
            return params["wte"][: config.vocab_size]
        return params[self.name] if self.layer is None else params[self.name][self.layer]


def targets(config: ModelConfig) -> Iterator[tuple[str, Target]]:
    """Yield each name of transformers, without prefix, and its target. Layers come last, in order."""
    for name, hf_name in OUTSIDE_LAYERS.items():
        yield hf_name, Target(name, None)
    for layer in range(config.num_layers):
        for name, hf_name in IN_LAYERS.items():
            yield f"h.{layer}.{hf_name}", Target(name, layer)


def match(folder: Path, tensors: Tensors, config: ModelConfig) -> dict[str, str]:
    """Map names without prefix to the names in ``tensors``, except masks. Nothing is loaded.

    Raises DataError unless names, shapes and dtypes are those of a GPT-2 of this shape; the head is optional.
    ``folder`` is used in error messages.
    """
    names = {name.removeprefix(PREFIX): name for name in tensors.info if not MASK.fullmatch(name.removeprefix(PREFIX))}
    if config.num_layers > len(names):  # bounds the work below for an absurd config
        raise DataError(f"{folder}: found {len(names)} tensors, which cannot be {config.num_layers:,} layers")
    expected = dict(targets(config))
    if twice := [name for name in names if PREFIX + name in tensors and name in tensors]:
        raise DataError(f"{folder}: found both {_join(twice)} and the same with {PREFIX!r} before; one is expected")
    if unknown := [full for name, full in names.items() if name not in expected and name != HEAD]:
        raise DataError(
            f"{folder}: found {_join(unknown)}, which a GPT-2 of {config.num_layers} layers does not have; "
            "is config.json of the same model?"
        )
    if missing := [name for name in expected if name not in names]:
        raise DataError(f"{folder}: the weights lack {_join(missing)} of a GPT-2 of {config.num_layers} layers")
    shapes = parameter_shapes(config) | {"wte": (config.vocab_size, config.channels)}
    for name, full in names.items():
        target = expected.get(name, expected["wte.weight"])  # the head has the embedding's shape
        shape = shapes[target.name] if target.layer is None else shapes[target.name][1:]
        shape = shape[::-1] if target.name in CONV1D else shape
        info = tensors.info[full]
        if info.shape != shape:
            raise DataError(f"{folder}: {full} is {info.shape}, where config.json asks for {shape}")
        if info.dtype not in FLOATS:
            raise DataError(f"{folder}: {full} is {info.dtype}, expected one of {', '.join(FLOATS)}")
    return names


def load(
    folder: Path,
    tensors: Tensors,
    names: Mapping[str, str],
    config: ModelConfig,
    into: Arrays,
    on_elements: Callable[[int], None] = lambda done: None,
) -> None:
    """Load tensors into the parameters ``into``, whose padding must be 0. ``names`` is the result of ``match``.

    ``on_elements`` is called with the number of elements loaded so far. Raises NonFiniteError, and DataError if the
    head differs from the embedding.
    """
    done = 0
    for name, target in targets(config):
        view, values = target.view(into, config), tensors[names[name]]
        view[...] = values.T if target.name in CONV1D else values
        done += view.size
        on_elements(done)
    if HEAD in names and not np.array_equal(tensors[names[HEAD]], into["wte"][: config.vocab_size]):
        raise DataError(f"{folder}: {names[HEAD]} differs from {names['wte.weight']}; only a tied head is supported")


def export(config: ModelConfig, params: Arrays) -> dict[str, NDArray[np.float32]]:
    """Return views of ``params`` by the names of a transformers model with head, without the tied head itself."""
    return {
        PREFIX + name: target.view(params, config).T if target.name in CONV1D else target.view(params, config)
        for name, target in targets(config)
    }


def _join(names: list[str]) -> str:
    """Join names for an error message; list only the first few."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
