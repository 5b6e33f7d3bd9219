"""GPT-2's ``config.json``, as Hugging Face's transformers writes and reads it."""

import json
from pathlib import Path
from typing import Any

from llmc_cli.errors import DataError
from llmc_cli.models.config import ModelConfig

REQUIRED = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
"""What must hold for the model to be computed as it was meant: per key the values that do, the first of them meant
where the key is absent."""


def read_config(path: Path) -> ModelConfig:
    """The shape in a config file. DataError where it is none, or of a model that this program would compute wrongly."""
    try:
        values = json.loads(path.read_bytes())
        shape = [int(values[key]) for key in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")]
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: not the JSON of a model's config: {error}") from None
    except KeyError as error:
        raise DataError(f"{path}: not the config of a GPT-2: it has no {error}") from None
    for key, allowed in REQUIRED.items():
        if values.get(key, allowed[0]) not in allowed:
            raise DataError(
                f"{path}: {key} is {values[key]!r}, where only {' or '.join(map(repr, allowed))} is supported"
            )
    config = ModelConfig(*shape)
    if min(shape) < 1 or config.channels % config.num_heads:
        raise DataError(f"{path}: {config.channels} channels in {config.num_heads} heads, {config.num_layers} layers")
    if values.get("n_inner") not in (None, 4 * config.channels):
        raise DataError(f"{path}: n_inner is {values['n_inner']}, where only 4 * n_embd is supported")
    return config


def config_values(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` says of a model of this shape."""
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
