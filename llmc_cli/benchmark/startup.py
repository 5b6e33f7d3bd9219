"""Startup time of ``llmc train``: from the start of the process to the end of the first step."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from llmc_cli.benchmark.interleave import STDERR_LINES, Log
from llmc_cli.benchmark.job import Job
from llmc_cli.benchmark.results import Row, SectionResult
from llmc_cli.errors import MissingError
from llmc_cli.formats.shard import write_shard


def measure_startup(job: Job, model: str, log: Log) -> SectionResult:
    """Measure startup with cached kernels (row ``warm``) and with an empty cache (``cold``).

    Row ``cold/compile`` is the difference. ``model`` is the value of ``--model``. One untimed run comes first, to read
    the program's files into memory. Raises MissingError if ``llmc train`` fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "start_train_000000.bin"
        count = job.batch * job.seq_len + 1
        write_shard(shard, np.random.default_rng(0).integers(0, job.config.vocab_size, count))
        times: dict[str, list[float]] = {"warm": [], "cold": []}
        log("start: warm-up run")
        time_first_step(job, model, shard, dict(os.environ))
        for run in range(job.steps):
            log(f"start: {run} of {job.steps} runs, warm and cold")
            times["warm"].append(time_first_step(job, model, shard, dict(os.environ)))
            with tempfile.TemporaryDirectory() as cache:
                empty_cache = {"LLMC_CACHE": cache, "CUPY_CACHE_DIR": cache}
                times["cold"].append(time_first_step(job, model, shard, os.environ | empty_cache))
    times["cold/compile"] = [cold - warm for warm, cold in zip(times["warm"], times["cold"], strict=True)]
    return SectionResult(
        [Row(f"start/{name}", statistics.median(each), min(each), len(each)) for name, each in times.items()], []
    )


def time_first_step(job: Job, model: str, shard: Path, environment: dict[str, str]) -> float:
    """Run ``llmc train`` in a new process, and return the seconds until it prints the first step."""
    command = [
        sys.executable, "-P", "-m", "llmc_cli.app", "train", "--model", model, "--data", str(shard),
        "--val-data", str(shard), "--batch", str(job.batch), "--seq-len", str(job.seq_len), "--steps", "1",
        "--val-every", "0", "--sample-every", "0", "--recompute", str(job.recompute), "--device", job.device,
        "--precision", job.precision, "--json", "--quiet",
    ]  # fmt: skip
    if job.threads is not None:
        command += ["--threads", str(job.threads)]
    with tempfile.TemporaryFile() as stderr:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "loss" in json.loads(line):
                    return time.perf_counter() - start
            status = process.wait()
            stderr.seek(0)
            lines = stderr.read().decode("utf-8", "replace").strip().splitlines()[-STDERR_LINES:]
            raise MissingError(f"bench start: llmc train ended with status {status}: {' / '.join(lines)}")
        finally:
            process.kill()
            process.communicate()
