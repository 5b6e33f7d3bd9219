import shutil

import numpy as np
import pytest
from support.paths import TINY_GPT2

from llmc_cli.formats.safetensors import SafetensorsFile, write_safetensors


@pytest.fixture
def tiny_folder(tmp_path):
    """A copy of the tiny model's Hugging Face folder."""
    shutil.copytree(TINY_GPT2 / "safetensors", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def rewrite_tensors(tiny_folder):
    """A function that applies a change to the dict of the folder's tensors, saves them, and returns the folder."""

    def run(change, dtype="float32"):
        path = tiny_folder / "model.safetensors"
        tensors = {name: np.array(values) for name, values in SafetensorsFile(path).items()}
        tensors = change(tensors) or tensors
        write_safetensors(path, tensors, dtype)
        return tiny_folder

    return run
