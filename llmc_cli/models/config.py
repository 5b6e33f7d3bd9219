"""What a model's shape is. Families differ by fields of this, never by a check of a name."""

from dataclasses import dataclass

VOCAB_MULTIPLE = 128
"""Vocabularies are padded to a multiple of this, so that the head's matrix has a friendly shape."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-2-like model (Radford et al. 2019)."""

    max_seq_len: int  # T
    vocab_size: int  # V
    num_layers: int  # L
    num_heads: int  # NH
    channels: int  # C
    norm_eps: float = 1e-5

    @property
    def padded_vocab_size(self) -> int:  # Vp
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_size(self) -> int:  # HS
        return self.channels // self.num_heads
