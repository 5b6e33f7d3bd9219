"""Names and shapes of GPT-2's parameters."""

import math

from llmc_cli.models.config import ModelConfig

MATRICES = ("qkvw", "attprojw", "fcw", "fcprojw")
"""The linear weights of a layer."""

DECAYED = ("wte", "wpe", *MATRICES)
"""Weight decay applies to matrices only, including embeddings, as in llm.c."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The sixteen tensors in the order of the parameter arena; each holds all layers. Linear weights are (out, in)."""
    T, L, C = config.max_seq_len, config.num_layers, config.channels
    return {
        "wte": (config.padded_vocab_size, C),
        "wpe": (T, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def parameter_count(config: ModelConfig) -> int:
    """Number of parameters, including the padding of the vocabulary."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def flops_per_token(config: ModelConfig, T: int) -> int:
    """FLOPs per token of training, forward and backward, as llm.c counts them.

    6N for N parameters including padding, and 6·L·C·T for causal attention (after Chowdhery et al. 2022,
    arXiv:2204.02311, appendix B).
    """
    return 6 * parameter_count(config) + 6 * config.num_layers * config.channels * T
