"""Conversion of models between formats, and writing of their debug states and tokenizer tables.

``plan`` checks a request; ``Conversion.run`` loads the source once, into one float32 arena, and writes all outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llmc_cli.conversion import debug_state
from llmc_cli.conversion.debug_state import Reference
from llmc_cli.conversion.sources import OnProgress, Source, open_source
from llmc_cli.conversion.targets import Request, Targets, check_paths, choose_targets
from llmc_cli.conversion.writers import WrittenFile, write_folder, write_model, written_file
from llmc_cli.errors import UsageError
from llmc_cli.formats.debug_state import write_debug_state
from llmc_cli.tokenizer.tokenizer import write_tokenizer_table

DEFAULT_BATCH, DEFAULT_SEQ_LEN = 4, 64  # of a debug state; models with fewer positions use all of them


@dataclass(frozen=True)
class Conversion:
    """A source and its outputs, checked as far as possible without loading the weights."""

    request: Request
    targets: Targets
    source: Source
    batch: debug_state.Batch | None
    reference: Reference | None

    def run(self, on_progress: OnProgress) -> Iterator[WrittenFile]:
        """Load the source and write the outputs, one after the other."""
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
                on_progress(f"computing with {self.reference}", 0, None)
                values = debug_state.compute(self.reference, config, params, self.batch)
                write_debug_state(targets.debug_state, *self.batch, values.logits, values.loss, values.grads)
                size = self.batch.inputs.size
                yield written_file(targets.debug_state, f"the logits, loss and gradients of {size:,} tokens")
        if targets.tokenizer:
            tokenizer = self.source.tokenizer()
            write_tokenizer_table(targets.tokenizer, tokenizer)
            yield written_file(targets.tokenizer, f"{tokenizer.vocab_size:,} tokens")


def plan(
    request: Request,
    on_progress: OnProgress = lambda description, done, total: None,
    on_warning: Callable[[str], None] = lambda message: None,
) -> Conversion:
    """Check ``request`` and open its source, downloading it if it is on the hub. Nothing is written yet.

    ``on_warning`` is called if the debug state's batch is taken from the bundled text. Raises UsageError, DataError,
    FormatError and MissingError.
    """
    targets = choose_targets(request)
    check_paths(request, targets)
    for name in ("batch", "seq_len", "data", "reference"):
        if getattr(request, name) is not None and not targets.debug_state:
            raise UsageError(f"--{name.replace('_', '-')} needs --debug-state FILE, which is missing")
    reference = debug_state.choose_reference(request.reference) if targets.debug_state else None
    needs_tokenizer = targets.folder is not None or targets.tokenizer is not None
    source = open_source(request.source, request.order, needs_tokenizer, on_progress)
    batch = None
    if targets.debug_state:
        max_seq_len = source.config.max_seq_len
        seq_len = min(DEFAULT_SEQ_LEN, max_seq_len) if request.seq_len is None else request.seq_len
        if seq_len > max_seq_len:
            raise UsageError(f"--seq-len {seq_len}: the model has a context of {max_seq_len} tokens")
        batch_size = request.batch or DEFAULT_BATCH
        batch = debug_state.load_batch(request.data, source.config, batch_size, seq_len, on_warning)
    if targets.tokenizer:
        source.tokenizer()  # raises its errors before anything is written
    return Conversion(request, targets, source, batch, reference)
