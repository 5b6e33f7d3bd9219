"""Named model shapes, as in the ``-e`` option of llm.c's trainer."""

from llmc_cli.errors import UsageError
from llmc_cli.models.config import ModelConfig

GPT2_VOCAB_SIZE = 50257

GPT2_DEPTHS = {  # layers: (channels, heads)
    6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20),
    48: (1600, 25), 60: (1920, 30), 72: (2880, 30), 84: (3456, 36),
}  # fmt: skip

GPT3_WIDTHS = {  # channels: (layers, head size)
    384: (6, 64), 768: (12, 64), 1024: (24, 64), 1536: (24, 96),
    2048: (24, 128), 2560: (32, 80), 4096: (32, 128), 12288: (96, 128),
}  # fmt: skip

PRESETS = {
    f"d{layers}": ModelConfig(1024, GPT2_VOCAB_SIZE, layers, heads, channels)
    for layers, (channels, heads) in GPT2_DEPTHS.items()
}
PRESETS |= {f"gpt2:{name}": config for name, config in PRESETS.items()}
PRESETS |= {
    f"gpt3:c{channels}": ModelConfig(2048, GPT2_VOCAB_SIZE, layers, channels // head_size, channels)
    for channels, (layers, head_size) in GPT3_WIDTHS.items()
}


def get_preset(name: str) -> ModelConfig:
    """Return the preset of this name. Raises UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(f"unknown model {name!r}: expected an existing model file or one of {', '.join(PRESETS)}")
    return PRESETS[name]
