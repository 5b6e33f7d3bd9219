"""Initialization of GPT-2's weights."""

from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.layout import MATRICES
from llmc_cli.rng import MersenneTwister

INIT_STD = 0.02
"""Standard deviation of the initial weights."""


def initialize(model: GPT2, seed: int, threads: int = 1) -> None:
    """Initialize the weights as PyTorch does with this seed, to float rounding.

    Normals are drawn in this order: wte (its first V rows), wpe, then the four matrices of each layer. Their standard
    deviation is 0.02, divided by sqrt(2L) for the two projections into the residual stream (Radford et al. 2019). Norm
    weights are 1; all other parameters are 0.
    """
    generator, config = MersenneTwister(seed), model.config
    with model.overwrite_params() as p:
        p.flat[:] = 0
        for name in ("ln1w", "ln2w", "lnfw"):
            p[name][:] = 1
        generator.fill_normal(p["wte"][: config.vocab_size].reshape(-1), INIT_STD, threads)
        generator.fill_normal(p["wpe"].reshape(-1), INIT_STD, threads)
        for layer in range(config.num_layers):
            for name in MATRICES:
                scale = (2 * config.num_layers) ** -0.5 if name.endswith("projw") else 1.0
                generator.fill_normal(p[name][layer].reshape(-1), INIT_STD * scale, threads)
