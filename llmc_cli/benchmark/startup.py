"""How long ``llmc train`` takes from the start of its process to the end of its first step."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llmc_cli.benchmark.interleave import TAIL, Note
from llmc_cli.benchmark.job import Work
from llmc_cli.benchmark.results import Measured, Row
from llmc_cli.errors import MissingError
from llmc_cli.formats.shard import write_shard


def measure_start(work: Work, model: str, note: Note) -> Measured:
    """Rows ``warm``, with the kernels in the cache; ``cold``, with an empty cache each time; and of the latter the part
    ``compile``, by which it takes longer. ``model`` is what ``--model`` is to be.

    The first run of all does not count: it brings files into memory. Raises MissingError where the program fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "start_train_000000.bin"
        count = work.batch * work.seq_len + 1
        write_shard(tokens, np.random.default_rng(0).integers(0, work.config.vocab_size, count))
        times: dict[str, list[float]] = {"warm": [], "cold": []}
        note("start: once untimed")
        first_step(work, model, tokens, dict(os.environ))
        for run in range(work.steps):
            note(f"start: {run} of {work.steps} runs, warm and cold")
            times["warm"].append(first_step(work, model, tokens, dict(os.environ)))
            with tempfile.TemporaryDirectory() as cache:
                empty = {"LLMC_CACHE": cache, "CUPY_CACHE_DIR": cache}
                times["cold"].append(first_step(work, model, tokens, os.environ | empty))
    times["cold/compile"] = [cold - warm for warm, cold in zip(times["warm"], times["cold"], strict=True)]
    return Measured(
        [Row(f"start/{name}", statistics.median(each), min(each), len(each)) for name, each in times.items()], []
    )


def first_step(work: Work, model: str, tokens: Path, environment: dict[str, str]) -> float:
    """Seconds until the line of the first step is out, in a process of its own, which is ended then."""
    command = [
        sys.executable, "-P", "-m", "llmc_cli.app", "train", "--model", model, "--data", str(tokens),
        "--val-data", str(tokens), "--batch", str(work.batch), "--seq-len", str(work.seq_len), "--steps", "1",
        "--val-every", "0", "--sample-every", "0", "--recompute", str(work.recompute), "--device", work.device,
        "--precision", work.precision, "--json", "--quiet",
    ]  # fmt: skip
    if work.threads is not None:
        command += ["--threads", str(work.threads)]
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "loss" in json.loads(line):
                    return time.perf_counter() - start
            status = process.wait()
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines()[-TAIL:]
            raise MissingError(f"bench start: llmc train ended with status {status}: {' / '.join(said)}")
        finally:
            process.kill()
            process.communicate()
