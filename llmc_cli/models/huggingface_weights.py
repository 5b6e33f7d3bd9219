"""GPT-2's tensors by the names that Hugging Face's transformers gives them, one for each layer.

Its linear weights are of a class Conv1D, which keeps them as (in, out): transposed, as seen from here. The head is tied
to the embedding; a file may hold it a second time. Names begin with ``transformer.`` or not, depending on whether the
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
"""Buffers of older versions: the causal mask, and what to put in its place."""

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

SHOWN = 3  # names in a message


class Place(NamedTuple):
    """Where a tensor of theirs belongs: in ours of this name, in one layer of it or in the whole."""

    name: str
    layer: int | None

    def view(self, params: Arrays, config: ModelConfig) -> NDArray[np.float32]:
        """The part of ``params``; the padding of the vocabulary, which only we have, is left out."""
        if self.name == "wte":
            return params["wte"][: config.vocab_size]
        return params[self.name] if self.layer is None else params[self.name][self.layer]


def places(config: ModelConfig) -> Iterator[tuple[str, Place]]:
    """Their names, without the prefix, and where each belongs, layer by layer."""
    for ours, theirs in OUTSIDE_LAYERS.items():
        yield theirs, Place(ours, None)
    for layer in range(config.num_layers):
        for ours, theirs in IN_LAYERS.items():
            yield f"h.{layer}.{theirs}", Place(ours, layer)


def match(folder: Path, tensors: Tensors, config: ModelConfig) -> dict[str, str]:
    """From the names without prefix to those in ``tensors``, the masks left out; nothing is loaded.

    Raises DataError unless they are those of a GPT-2 of this shape, perhaps with a head, and shapes and dtypes are
    right. ``folder`` is where they come from, for the message.
    """
    names = {name.removeprefix(PREFIX): name for name in tensors.info if not MASK.fullmatch(name.removeprefix(PREFIX))}
    if config.num_layers > len(names):  # whatever the config says, work is bounded by what is there
        raise DataError(f"{folder}: found {len(names)} tensors, which cannot be {config.num_layers:,} layers")
    expected = dict(places(config))
    if twice := [name for name in names if PREFIX + name in tensors and name in tensors]:
        raise DataError(f"{folder}: found both {_some(twice)} and the same with {PREFIX!r} before; one is expected")
    if unknown := [full for name, full in names.items() if name not in expected and name != HEAD]:
        raise DataError(
            f"{folder}: found {_some(unknown)}, which a GPT-2 of {config.num_layers} layers does not have; "
            "is config.json of the same model?"
        )
    if missing := [name for name in expected if name not in names]:
        raise DataError(f"{folder}: the weights lack {_some(missing)} of a GPT-2 of {config.num_layers} layers")
    shapes = parameter_shapes(config) | {"wte": (config.vocab_size, config.channels)}
    for name, full in names.items():
        place = expected.get(name, expected["wte.weight"])  # the head has the embedding's shape
        shape = shapes[place.name] if place.layer is None else shapes[place.name][1:]
        shape = shape[::-1] if place.name in CONV1D else shape
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
    """Fill the sixteen tensors ``into``, whose padding must be 0, one of theirs after the other, by ``match``'s names.

    ``on_elements`` takes how many numbers are loaded. Raises NonFiniteError, and DataError for a head that is not the
    embedding.
    """
    done = 0
    for theirs, place in places(config):
        view, values = place.view(into, config), tensors[names[theirs]]
        view[...] = values.T if place.name in CONV1D else values
        done += view.size
        on_elements(done)
    if HEAD in names and not np.array_equal(tensors[names[HEAD]], into["wte"][: config.vocab_size]):
        raise DataError(f"{folder}: {names[HEAD]} differs from {names['wte.weight']}; only a tied head is supported")


def export(config: ModelConfig, params: Arrays) -> dict[str, NDArray[np.float32]]:
    """Views of ``params`` by the names that transformers saves a model with head under; the tied head is left out."""
    return {
        PREFIX + theirs: place.view(params, config).T if place.name in CONV1D else place.view(params, config)
        for theirs, place in places(config)
    }


def _some(names: list[str]) -> str:
    """The names, or the first few of many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
