"""The shapes of the presets, and their names for the help. Light to import: `--help` reads it."""

GPT2_DEPTHS = {  # layers: (channels, heads)
    6: (384, 6), 12: (768, 12), 24: (1024, 16), 36: (1280, 20),
    48: (1600, 25), 60: (1920, 30), 72: (2880, 30), 84: (3456, 36),
}  # fmt: skip

GPT3_WIDTHS = {  # channels: (layers, head size)
    384: (6, 64), 768: (12, 64), 1024: (24, 64), 1536: (24, 96),
    2048: (24, 128), 2560: (32, 80), 4096: (32, 128), 12288: (96, 128),
}  # fmt: skip

PRESETS_HELP = (
    f"{', '.join(f'd{layers}' for layers in GPT2_DEPTHS)} (GPT-2 with this number of layers; gpt2:dN is the same as "
    f"dN), or gpt3:cN (GPT-3 with N channels: {', '.join(map(str, GPT3_WIDTHS))})"
)
