"""The shape of a model. Model families differ in the fields of ``ModelConfig``; code never checks a model's name."""

from dataclasses import dataclass

from llmc_cli.formats.weights import VOCAB_MULTIPLE


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-2-like model (Radford et al. 2019)."""

    max_seq_len: int  # T
    vocab_size: int  # V
    num_layers: int  # L
    num_heads: int  # NH
    channels: int  # C
    padded_vocab_size: int = 0  # Vp; by default V rounded up to a multiple of VOCAB_MULTIPLE
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        padded = self.padded_vocab_size or -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        object.__setattr__(self, "padded_vocab_size", padded)  # the class is frozen

    @property
    def head_size(self) -> int:  # HS
        return self.channels // self.num_heads
