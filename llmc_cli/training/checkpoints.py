"""The directory of a training run and its checkpoints.

A checkpoint of step N consists of ``model_N.bin``, ``state_N_rank.bin`` and an empty ``DONE_N`` (llm.c's names and
formats), written in this order. A checkpoint without its DONE file is incomplete and ignored. ``run.json`` stores what
these files cannot: the options of the run, and for each checkpoint the windows of the outlier detectors.
"""

import json
import re
from pathlib import Path
from typing import Any

import filelock

from llmc_cli.data.batches import Position
from llmc_cli.errors import DataError, UsageError
from llmc_cli.formats.atomic import atomic_write
from llmc_cli.formats.train_state import MERSENNE_WORDS as WORDS
from llmc_cli.formats.train_state import Mersenne, Shuffle, TrainState, write_train_state
from llmc_cli.models.files import save_model
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.training.optimizer import AdamW

SCHEMA = 1


class RunFolder:
    """The directory of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lock(self) -> filelock.BaseFileLock:
        """Lock the directory for this process, creating it if needed; UsageError if another process has locked it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise UsageError(f"{self.path}: another run is using this directory; use a different --out") from None
        for unfinished in self.path.glob(".*.part"):  # left by a process that was killed while writing
            unfinished.unlink()
        return lock

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints in ascending order."""
        if not self.path.is_dir():
            return []
        matches = (re.fullmatch(r"DONE_(\d{8})", entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def model_path(self, step: int) -> Path:
        return self.path / f"model_{step:08d}.bin"

    def state_path(self, step: int, rank: int = 0) -> Path:
        return self.path / f"state_{step:08d}_{rank:05d}.bin"

    def done_path(self, step: int) -> Path:
        return self.path / f"DONE_{step:08d}"

    def write(self, step: int, model: GPT2, optimizer: AdamW, state: TrainState, record: dict[str, Any]) -> None:
        """Write the checkpoint of ``step``; ``record`` is stored in run.json."""
        save_model(self.model_path(step), model)
        master = model.host_params().flat if state.has_master else None
        m, v = (model.kernels.download(moment) for moment in (optimizer.m, optimizer.v))
        write_train_state(self.state_path(step), state, m, v, master)
        run = self.read_record()
        existing = {str(old): run["checkpoints"][str(old)] for old in self.steps() if str(old) in run["checkpoints"]}
        self.write_record({**run, "checkpoints": {**existing, str(step): record}})
        with atomic_write(self.done_path(step)):
            pass

    def delete(self, step: int) -> None:
        """Delete the checkpoint of ``step`` if it exists, its DONE file first."""
        paths = self.done_path(step), self.state_path(step), self.model_path(step)
        for path in paths:
            path.unlink(missing_ok=True)

    def read_record(self) -> dict[str, Any]:
        """Return the content of run.json, without checkpoints if llm.c started the run; DataError if it is damaged."""
        path = self.path / "run.json"
        if not path.exists():
            return {"schema": SCHEMA, "checkpoints": {}}
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            if record["schema"] == SCHEMA and isinstance(record["checkpoints"], dict):
                return record
            found = f"schema {record['schema']}"
        except (ValueError, KeyError, TypeError) as error:
            found = f"invalid content ({type(error).__name__}: {error})"
        raise DataError(f"{path}: found {found}, expected the record of a run, schema {SCHEMA}; move the file away")

    def write_record(self, record: dict[str, Any]) -> None:
        with atomic_write(self.path / "run.json") as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")


def train_state(
    step: int, position: Position, rng_state: int, rng_state_before_update: int, seed: int, has_master: bool = False
) -> TrainState:
    """Return the training state of a single process after ``step`` updates, at ``position`` in the data."""
    shuffle = None
    if position.generator is not None:
        assert position.shard_order is not None and position.sample_order is not None
        words, drawn = position.generator
        mersenne = Mersenne(seed, WORDS + 1 - drawn if drawn else 1, drawn, words)
        shuffle = Shuffle(position.shard_order, position.sample_order, mersenne)
    return TrainState(
        1, 0, step, rng_state, rng_state_before_update, position.shard, position.sample, shuffle, has_master
    )


def data_position(state: TrainState) -> Position:
    """Return the position in the data that ``state`` stores."""
    if state.shuffle is None:
        return Position(state.current_shard, state.current_sample)
    mersenne = state.shuffle.mersenne
    return Position(
        state.current_shard,
        state.current_sample,
        state.shuffle.shard_order,
        state.shuffle.sample_order,
        (mersenne.words, mersenne.next),
    )
