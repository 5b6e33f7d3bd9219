"""Plan the names and sizes of the token files to write.

This module imports nothing large, so that the command line can use its defaults.
"""

from dataclasses import dataclass
from pathlib import Path

from llmc_cli.errors import UsageError

SHARD_TOKENS = 100_000_000
VAL_TOKENS = 32_768
VAL_FRACTION = 10
"""By default 1/VAL_FRACTION of the text, at most VAL_TOKENS tokens, is used for validation."""


@dataclass(frozen=True)
class ShardPlan:
    """Which token files to write in ``folder``.

    The files are ``name``_val.bin and ``name``_train.bin. If the training tokens need several files, they are
    ``name``_val_000000.bin, ``name``_train_000001.bin, ``name``_train_000002.bin and so on. ``headerless``: write int32
    ids without a header. ``val_tokens``: None for the default above, 0 for no validation file.
    """

    folder: Path
    name: str
    headerless: bool = False
    shard_tokens: int = SHARD_TOKENS
    val_tokens: int | None = None
    workers: int = 1

    def check(self) -> None:
        """Raise UsageError for sizes out of range."""
        from llmc_cli.formats.shard import MAX_TOKENS

        if not 0 < self.shard_tokens <= MAX_TOKENS:
            raise UsageError(f"--shard-tokens: found {self.shard_tokens:,}, expected 1 to {MAX_TOKENS:,}")
        if self.val_tokens is not None and not 0 <= self.val_tokens <= self.shard_tokens:
            raise UsageError(
                f"--val-tokens: found {self.val_tokens:,}, expected 0 to {self.shard_tokens:,} (--shard-tokens)"
            )
