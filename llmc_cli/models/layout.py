"""Names and shapes of what a model keeps, in the order it is kept."""

import math

from llmc_cli.formats.weights import shapes
from llmc_cli.models.config import ModelConfig

DECAYED = ("wte", "wpe", "qkvw", "attprojw", "fcw", "fcprojw")
"""Weight decay acts on matrices only, embeddings included (the C trainer's choice)."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The sixteen tensors of GPT-2 in file order, each one for all layers together; linear weights are (out, in)."""
    return shapes(config.max_seq_len, config.num_layers, config.channels, config.padded_vocab_size)


def parameter_count(config: ModelConfig) -> int:
    """All parameters, the padding of the vocabulary included."""
    return sum(math.prod(shape) for shape in parameter_shapes(config).values())


def flops_per_token(config: ModelConfig, T: int) -> int:
    """FLOPs of training on one token, forward and backward: 6N for the N parameters, padding included, and 6·L·C·T for
    causal attention, as the C trainer counts them (after Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
    return 6 * parameter_count(config) + 6 * config.num_layers * config.channels * T
