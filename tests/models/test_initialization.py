import math

import numpy as np

from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.initialization import initialize
from llmc_cli.rng import MersenneTwister

CONFIG = ModelConfig(max_seq_len=12, vocab_size=37, num_layers=2, num_heads=2, channels=8)


def test_initial_weights():
    model = GPT2(CONFIG, ReferenceKernels())
    model.params.flat[:] = np.nan
    initialize(model, 42)
    p, generator = model.params, MersenneTwister(42)

    def normals(shape, std):
        out = np.empty(math.prod(shape))
        generator.fill_normal(out, std)
        return out.reshape(shape)

    np.testing.assert_array_equal(p["wte"][:37], normals((37, 8), 0.02))
    np.testing.assert_array_equal(p["wpe"], normals((12, 8), 0.02))
    for layer in range(2):
        np.testing.assert_array_equal(p["qkvw"][layer], normals((24, 8), 0.02))
        np.testing.assert_allclose(p["attprojw"][layer], normals((8, 8), 0.01), rtol=1e-6)
        np.testing.assert_array_equal(p["fcw"][layer], normals((32, 8), 0.02))
        np.testing.assert_allclose(p["fcprojw"][layer], normals((8, 32), 0.01), rtol=1e-6)
    assert not p["wte"][37:].any()
    for name in ("ln1w", "ln2w", "lnfw"):
        assert (p[name] == 1).all()
    for name in ("ln1b", "ln2b", "lnfb", "qkvb", "attprojb", "fcb", "fcprojb"):
        assert not p[name].any()


def test_initialization_does_not_download_parameters(monkeypatch):
    monkeypatch.delattr(ReferenceKernels, "download")
    model = GPT2(CONFIG, ReferenceKernels())
    initialize(model, 42)
    assert model.params["wte"][: CONFIG.vocab_size].all()
