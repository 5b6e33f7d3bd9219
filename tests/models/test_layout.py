import pytest

from llmc_cli.formats.weights import MAGIC, TENSORS, GPT2Header, tensor_shapes
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.layout import flops_per_token, parameter_count, parameter_shapes
from llmc_cli.models.presets import get_preset


@pytest.mark.parametrize("version", [3, 5])
def test_parameters_are_in_the_order_and_shapes_of_a_model_file(version):
    c = ModelConfig(max_seq_len=12, vocab_size=37, num_layers=2, num_heads=2, channels=8)
    header = GPT2Header(
        MAGIC, version, c.max_seq_len, c.vocab_size, c.num_layers, c.num_heads, c.channels, c.padded_vocab_size
    )
    assert list(parameter_shapes(c).items()) == list(tensor_shapes(header).items())
    assert tuple(parameter_shapes(c)) == TENSORS


def test_sizes_of_the_124m_model():
    config = get_preset("d12")
    assert config.padded_vocab_size == 50304
    assert parameter_count(config) == 124_475_904
    assert flops_per_token(config, 64) == 6 * 124_475_904 + 6 * 12 * 768 * 64
