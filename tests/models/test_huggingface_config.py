import json

import pytest

from llmc_cli.errors import DataError
from llmc_cli.models import huggingface_config
from llmc_cli.models.config import ModelConfig

CONFIG = ModelConfig(max_seq_len=12, vocab_size=37, num_layers=2, num_heads=2, channels=8)


def test_round_trip(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(huggingface_config.config_to_dict(CONFIG)))
    assert huggingface_config.read_config(path) == CONFIG


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"model_type": "gptj"}, "model_type"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"n_inner": 7}, "n_inner"),
        ({"n_head": 3}, "8 channels in 3 heads"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_layer": "two"}, "not the JSON"),
        ({"n_layer": 0}, "0 layers"),
    ],
)
def test_unsupported_models_are_rejected(tmp_path, change, text):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**huggingface_config.config_to_dict(CONFIG), **change}))
    with pytest.raises(DataError, match=text):
        huggingface_config.read_config(path)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "gpt2"}', '{"n_positions": 1e999}'])
def test_invalid_files_are_rejected(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"config\.json"):
        huggingface_config.read_config(path)
