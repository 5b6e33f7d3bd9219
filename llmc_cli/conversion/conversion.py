"""Models from one form into another, and what belongs to a model: a debug state, a tokenizer table.

What is asked for is checked first, then the source is loaded once, into one arena of float32, and everything is written
from there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmc_cli.conversion import debug_state
from llmc_cli.conversion.debug_state import Reference
from llmc_cli.conversion.sources import OnProgress, Source, open_source
from llmc_cli.conversion.targets import Request, Targets, check_paths, choose_targets
from llmc_cli.conversion.writers import Written, _written, write_folder, write_model
from llmc_cli.errors import UsageError
from llmc_cli.formats.debug_state import write_debug_state
from llmc_cli.tokenizer.tokenizer import write_tokenizer_table

BATCH, SEQ_LEN = 4, 64  # of a debug state, where the model allows it


@dataclass(frozen=True)
class Conversion:
    """A source and what it becomes, checked as far as that goes without loading it."""

    request: Request
    targets: Targets
    source: Source
    batch: debug_state.Batch | None
    reference: Reference | None

    def run(self, on_progress: OnProgress) -> Iterator[Written]:
        """Load, and write one file after the other."""
        targets, config = self.targets, self.source.config
        if targets.models or targets.folder or self.batch:
            params = self.source.load(on_progress)
            for path, version in targets.models:
                on_progress(f"writing {path}", 0, None)
                yield write_model(path, config, params, version)
            if targets.folder:
                on_progress(f"writing {targets.folder}", 0, None)
                yield from write_folder(targets.folder, self.source, params, self.request.dtype or "fp32")
            if targets.debug_state and self.batch and self.reference:
                on_progress(f"computing by {self.reference}", 0, None)
                values = debug_state.compute(self.reference, config, params, self.batch)
                write_debug_state(targets.debug_state, *self.batch, values.logits, values.loss, values.grads)
                size = self.batch.inputs.size
                yield _written(targets.debug_state, f"the logits, loss and gradients of {size:,} tokens")
        if targets.tokenizer:
            tokenizer = self.source.tokenizer()
            write_tokenizer_table(targets.tokenizer, tokenizer)
            yield _written(targets.tokenizer, f"{tokenizer.vocab_size:,} tokens")


def plan(
    request: Request,
    on_progress: OnProgress = lambda what, done, total: None,
    on_shortfall: Callable[[str], None] = lambda why: None,
) -> Conversion:
    """Check ``request`` and open its source, fetching it where it is on the hub; nothing is written yet.

    ``on_shortfall`` is told where the debug state's batch comes from the bundled text. Raises UsageError, DataError,
    FormatError and MissingError.
    """
    targets = choose_targets(request)
    check_paths(request, targets)
    for name in ("batch", "seq_len", "data", "reference"):
        if getattr(request, name) is not None and not targets.debug_state:
            raise UsageError(f"--{name.replace('_', '-')} is of a debug state; ask for one by --debug-state FILE")
    reference = debug_state.choose_reference(request.reference) if targets.debug_state else None
    brings_tokenizer = targets.folder is not None or targets.tokenizer is not None
    source = open_source(request.source, request.order, brings_tokenizer, on_progress)
    batch = None
    if targets.debug_state:
        longest = source.config.max_seq_len
        seq_len = min(SEQ_LEN, longest) if request.seq_len is None else request.seq_len
        if seq_len > longest:
            raise UsageError(f"--seq-len {seq_len}: the model has {longest} positions")
        batch = debug_state.take_batch(request.data, source.config, request.batch or BATCH, seq_len, on_shortfall)
    if targets.tokenizer:
        source.tokenizer()  # what is wrong with it is said before anything is written
    return Conversion(request, targets, source, batch, reference)
