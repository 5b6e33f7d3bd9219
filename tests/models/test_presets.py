import pytest

from llmc_cli.errors import UsageError
from llmc_cli.models.presets import PRESETS, get_preset


def test_channels_are_a_multiple_of_heads():
    assert all(config.channels % config.num_heads == 0 for config in PRESETS.values())
    assert get_preset("gpt2:d48") == get_preset("d48")
    assert get_preset("gpt3:c2560").head_size == 80


def test_unknown_preset():
    with pytest.raises(UsageError, match=r"unknown model 'd13': .* config\.json, or one of d6, .*d84, gpt3:c384"):
        get_preset("d13")
