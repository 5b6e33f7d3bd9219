"""Read and write GPT-2's ``config.json`` of Hugging Face transformers."""

import json
from pathlib import Path
from typing import Any

from llmc_cli.errors import DataError
from llmc_cli.models.config import ModelConfig

REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh approximation
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""The supported values by key. The first one is assumed where the key is absent."""


def read_config(path: Path) -> ModelConfig:
    """Return the shape in a config file. Raises DataError if the file is invalid or the model is not supported."""
    try:
        values = json.loads(path.read_bytes())
        shape = [int(values[key]) for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not the JSON of a model config: {error}") from None
    except KeyError as error:
        raise DataError(f"{path}: not a GPT-2 config: {error} is missing") from None
    for key, allowed in REQUIRED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise DataError(f"{path}: {key} is {values[key]!r}; only {' or '.join(map(repr, allowed))} is supported")
    config = ModelConfig(*shape)
    if min(shape) < 1 or config.channels % config.num_heads:
        raise DataError(f"{path}: {config.channels} channels in {config.num_heads} heads, {config.num_layers} layers")
    if values.get("n_inner") not in (None, 4 * config.channels):
        raise DataError(f"{path}: n_inner is {values['n_inner']}; only 4 * n_embd is supported")
    return config


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Return the content of ``config.json`` for a model of this shape."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{key: allowed[0] for key, allowed in REQUIRED.items()},
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.channels,
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
    }
