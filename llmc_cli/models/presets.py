"""Named model shapes, as in the ``-e`` option of llm.c's trainer."""

from llmc_cli.errors import UsageError
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.preset_shapes import GPT2_DEPTHS, GPT3_WIDTHS

GPT2_VOCAB_SIZE = 50257

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
        presets = ", ".join(each for each in PRESETS if not each.startswith("gpt2:"))
        raise UsageError(
            f"unknown model {name!r}: expected an existing model file or Hugging Face config.json, or one of {presets}"
        )
    return PRESETS[name]
