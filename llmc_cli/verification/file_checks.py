"""Identification and complete checks of files. Each file is read once, in chunks."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmc_cli.errors import LlmcError
from llmc_cli.formats.debug_state import check_debug_state
from llmc_cli.formats.errors import FormatError, MagicError, RangeError
from llmc_cli.formats.evalset import read_evalset
from llmc_cli.formats.header import HEADER_BYTES
from llmc_cli.formats.registry import FORMATS, Kind, check_readable, identify
from llmc_cli.formats.safetensors import CHECKPOINT_FILES, open_checkpoint, open_tensors
from llmc_cli.formats.shard import read_shard
from llmc_cli.formats.stream import blocks, item_bytes, map_array
from llmc_cli.formats.tensors import Tensors
from llmc_cli.formats.train_state import check_train_state
from llmc_cli.formats.vocabulary import read_vocabulary
from llmc_cli.formats.weights import VERSIONS, GPT2Header, check_weights, find_order, read_header, tensor_shapes
from llmc_cli.models.presets import GPT2_VOCAB_SIZE
from llmc_cli.training.checkpoints import RunFolder

VOCAB_SIZES = {Kind.SHARD_GPT2: GPT2_VOCAB_SIZE, Kind.SHARD_LLAMA3: 128256}
"""Vocabulary sizes of the shards' tokenizers, used if the shard is checked without a model."""

KNOWN_KINDS = (
    *(kind.value for kind in FORMATS if FORMATS[kind].readable),
    Kind.SAFETENSORS.value,
    Kind.TORCH_ZIP.value,
    "Hugging Face folder",
    "folder of a training run",
)


@dataclass(frozen=True)
class FileReport:
    """The result of checking one file. ``error`` is None if the file is valid."""

    path: str
    kind: str | None = None
    version: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)  # properties of the content, by name
    error: str | None = None


@dataclass(frozen=True)
class _Content:
    version: int | None
    facts: dict[str, Any]


def check_files(paths: Sequence[Path]) -> Iterator[FileReport]:
    """Check files and folders. A training run's folder yields a report per file of its complete checkpoints.

    If exactly one of ``paths`` is a GPT-2 model, the other files are checked against it: its vocabulary size bounds
    their token ids, and its shape determines the size of debug states and training states.
    """
    model = _only_model(paths)
    for path in paths:
        if RunFolder(path).steps():
            yield from _check_run(RunFolder(path))
        elif path.is_dir():
            yield _report(path, "Hugging Face folder", _check_folder)
        else:
            yield check_file(path, model)


def check_file(path: Path, model: GPT2Header | None = None) -> FileReport:
    """Check one file, against the model with the header ``model`` if given."""
    try:
        kind = _identify(path)
    except (FormatError, OSError) as error:
        return FileReport(str(path), error=_error_message(error))
    return _report(path, kind.value, lambda path: CHECKS[kind](path, model))


def _identify(path: Path) -> Kind:
    try:
        kind = identify(path)
    except MagicError as error:
        raise MagicError(path, error.found, f"one of: {', '.join(KNOWN_KINDS)}", error.remedy) from None
    check_readable(path, kind)
    return kind


def _report(path: Path, kind: str, check: Callable[[Path], _Content]) -> FileReport:
    try:
        content = check(path)
    except (FormatError, LlmcError, OSError) as error:
        return FileReport(str(path), kind, error=_error_message(error))
    return FileReport(str(path), kind, content.version, content.facts)


def _error_message(error: Exception) -> str:
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)


def _only_model(paths: Sequence[Path]) -> GPT2Header | None:
    """Return the header of the GPT-2 model among ``paths``, or None unless there is exactly one."""
    headers: list[GPT2Header] = []
    for path in paths:
        # other and damaged files are skipped here; check_file reports their errors
        with contextlib.suppress(FormatError, OSError):
            headers.append(read_header(path))
    return headers[0] if len(headers) == 1 else None


def _check_model(path: Path, model: GPT2Header | None) -> _Content:
    header = check_weights(path)
    version = VERSIONS[header.version]
    _check_padding(path, header)
    order = {"order": find_order(path, header)} if header.version == 2 else {}
    return _Content(
        header.version,
        {
            **_shape(header),
            "parameters": sum(math.prod(shape) for shape in tensor_shapes(header).values()),
            "dtype": version.dtype if version.dtype == version.norm_dtype else f"{version.dtype}, float32 norms",
            **order,
        },
    )


def _shape(header: GPT2Header) -> dict[str, int]:
    return {
        "T": header.max_seq_len,
        "V": header.vocab_size,
        "Vp": header.padded_vocab_size,
        "L": header.num_layers,
        "NH": header.num_heads,
        "C": header.channels,
    }


def _check_padding(path: Path, header: GPT2Header) -> None:
    """Check that the padding rows of wte, the first tensor in every version, are 0."""
    V, C = header.vocab_size, header.channels
    dtype = VERSIONS[header.version].dtype
    count = (tensor_shapes(header)["wte"][0] - V) * C
    bits = map_array(
        path, "uint16" if dtype == "bfloat16" else "uint32", HEADER_BYTES + V * C * item_bytes(dtype), count
    )
    nonzero = np.flatnonzero(bits << 1)  # -0 is allowed
    if nonzero.size:
        raise RangeError(
            path,
            f"a nonzero value in row {V + int(nonzero[0]) // C} of wte",
            f"0 in all padding rows (from row {V})",
            "the file is damaged",
        )


def _check_debug_state(path: Path, model: GPT2Header | None) -> _Content:
    state = check_debug_state(path, model)
    facts: dict[str, Any] = {
        "B": state.header.batch,
        "T": state.header.seq_len,
        **_id_range(np.stack([state.x, state.y])),
    }
    if state.loss is not None:
        facts["loss"] = state.loss
    else:
        facts["values"] = state.values.size
    return _Content(state.header.version, facts)


def _check_shard(path: Path, model: GPT2Header | None) -> _Content:
    shard = read_shard(path)
    vocab_size = model.vocab_size if model else VOCAB_SIZES[shard.kind]
    ids = _id_range(shard.tokens)
    if ids and ids["max id"] >= vocab_size:
        shard.check(vocab_size)  # raises an error with the position
    return _Content(shard.header.version, {"tokens": shard.header.num_tokens, **ids})


def _check_evalset(path: Path, model: GPT2Header | None) -> _Content:
    evalset = read_evalset(path)
    evalset.check(model.vocab_size if model else VOCAB_SIZES[Kind.SHARD_GPT2])
    header = evalset.header
    return _Content(
        header.version, {"examples": header.num_examples, "longest example": f"{header.longest_example} bytes"}
    )


def _check_vocabulary(path: Path, model: GPT2Header | None) -> _Content:
    vocabulary = read_vocabulary(path)
    return _Content(
        vocabulary.version,
        {
            "tokens": len(vocabulary.tokens),
            "end of text": vocabulary.end_of_text,
            "longest token": f"{max(map(len, vocabulary.tokens))} bytes",
        },
    )


def _check_train_state(path: Path, model: GPT2Header | None) -> _Content:
    state, num_parameters = check_train_state(path)
    if model is not None and num_parameters not in (allowed := _partition_sizes(model, state.processes)):
        raise RangeError(
            path,
            f"{num_parameters:,} parameters",
            " or ".join(f"{count:,}" for count in sorted(allowed)) + " for the model",
            "the file belongs to another model, or is truncated",
        )
    facts: dict[str, Any] = {
        "step": state.step,
        "rank": state.rank,
        "processes": state.processes,
        "parameters": num_parameters,
        "master weights": state.has_master,
        "shard": state.current_shard,
        "sample": state.current_sample,
    }
    if state.shuffle is not None:
        facts |= {"shards": state.shuffle.shard_order.size, "samples in shard": state.shuffle.sample_order.size}
    return _Content(1, facts)


def _partition_sizes(model: GPT2Header, processes: int) -> set[int]:
    """Return the possible parameter counts of a rank: all parameters, or its ZeRO partition.

    With ZeRO, each layer's tensor is divided among the processes if its size is a multiple of their number.
    """
    shapes = tensor_shapes(model._replace(version=3))  # llm.c keeps the padding rows in memory in any version
    total = partition = 0
    for name, shape in shapes.items():
        layers = 1 if name in ("wte", "wpe", "lnfw", "lnfb") else shape[0]
        size = math.prod(shape) // layers
        total += layers * size
        partition += layers * (size // processes if size % processes == 0 else size)
    return {total, partition}


def _check_tensor_file(path: Path, model: GPT2Header | None) -> _Content:
    return _check_tensors(open_tensors(path))


def _check_tensors(tensors: Tensors) -> _Content:
    for _ in tensors.values():  # loading a tensor checks that it is finite
        pass
    return _Content(
        None,
        {
            "tensors": len(tensors),
            "elements": sum(math.prod(info.shape) for info in tensors.info.values()),
            "dtypes": ", ".join(sorted({info.dtype for info in tensors.info.values()})),
        },
    )


def _check_folder(path: Path) -> _Content:
    if not any((path / name).is_file() for name in CHECKPOINT_FILES):
        raise MagicError(
            path,
            "a folder without weights",
            f"a Hugging Face folder ({' or '.join(CHECKPOINT_FILES)}) or the folder of a training run (DONE_*)",
        )
    content = _check_tensors(open_checkpoint(path))
    config = path / "config.json"
    if config.is_file():
        try:
            values = dict(json.loads(config.read_bytes()))
        except (ValueError, TypeError) as error:
            raise RangeError(config, f"invalid JSON ({error})", "a JSON object") from None
        return _Content(None, {"model": values.get("model_type"), **content.facts})
    return content


def _check_run(folder: RunFolder) -> Iterator[FileReport]:
    """Check the model and the training states of every complete checkpoint, the states against the model."""
    for step in folder.steps():
        model_path = folder.model_path(step)
        yield check_file(model_path)
        model = _only_model([model_path])
        states = sorted(folder.path.glob(folder.state_path(step).name.replace("_00000.bin", "_*.bin")))
        for path in states or [folder.state_path(step)]:
            report = check_file(path, model)
            if report.error is None:
                found_step, found_processes = report.facts["step"], report.facts["processes"]
                if (found_step, found_processes) != (step, len(states)):
                    error = (
                        f"{path}: found step {found_step} and {found_processes} processes, "
                        f"expected step {step} and {len(states)} processes"
                    )
                    report = dataclasses.replace(report, error=error)
            yield report


def _id_range(ids: NDArray[Any]) -> dict[str, int]:
    """Return the smallest and largest token ids, or an empty dict if there are none."""
    if ids.size == 0:
        return {}
    low, high = zip(*((int(block.min()), int(block.max())) for block in blocks(ids)), strict=True)
    return {"min id": min(low), "max id": max(high)}


CHECKS: dict[Kind, Callable[[Path, GPT2Header | None], _Content]] = {
    Kind.GPT2_MODEL: _check_model,
    Kind.GPT2_DEBUG_STATE: _check_debug_state,
    Kind.SHARD_GPT2: _check_shard,
    Kind.SHARD_LLAMA3: _check_shard,
    Kind.EVALSET: _check_evalset,
    Kind.VOCABULARY: _check_vocabulary,
    Kind.TRAIN_STATE: _check_train_state,
    Kind.SAFETENSORS: _check_tensor_file,
    Kind.TORCH_ZIP: _check_tensor_file,
}
