"""Conversions as ``llmc convert`` runs them, and the files of the tiny model."""

import runpy

import numpy as np
from support.paths import FIXTURES, TINY_GPT2

from llmc_cli.conversion.conversion import plan
from llmc_cli.conversion.targets import Request
from llmc_cli.formats.weights import load_weights, read_header, tensor_shapes

MODEL, BF16, STATE = (TINY_GPT2 / name for name in ("model.bin", "model_bf16.bin", "debug_state.bin"))


def convert(source, dest=None, **options):
    return list(plan(Request(str(source), dest, **options)).run(lambda what, done, total: None))


def load_tensors(path):
    """Load the tensors of a model file, by name."""
    header = read_header(path)
    shapes = tensor_shapes(header._replace(version=3))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    load_weights(path, tensors)
    return tensors


def transformers_model(seed):
    """Create a model of the tiny model's shape with PyTorch and transformers."""
    return runpy.run_path(str(FIXTURES / "make_gpt2_goldens.py"))["make_model"](seed=seed)
