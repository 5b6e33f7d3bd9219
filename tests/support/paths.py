"""Paths of the repository that tests use."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
TINY_GPT2 = FIXTURES / "tiny_gpt2"
CUDA_EMULATOR = ROOT / "tests" / "support" / "cuda_emulator"
