import dataclasses
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest

from llmc_cli.formats.shard import write_shard
from llmc_cli.kernels.backend import open_kernels
from llmc_cli.machine.cores import available_cores
from llmc_cli.machine.idle_threads import set_passive_wait
from llmc_cli.models import huggingface_config
from llmc_cli.models.config import ModelConfig
from llmc_cli.training.options import TrainOptions

set_passive_wait()  # before numba and scipy load, as the program does

# a background job may have these ignored, and so would the processes that tests send them to
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)
os.environ["LLMC_DEVICE"] = "cpu"  # what "auto" is, whatever card there may be; on one runs what asks for it
os.environ.setdefault("NUMBA_NUM_THREADS", str(max(2, available_cores())))  # one core runs two threads too


@pytest.fixture(scope="session")
def backend():
    return open_kernels("cpu", "fp32", 1)  # tiny models gain nothing by threads, and lose on a busy machine


@pytest.fixture
def no_cupy(monkeypatch):
    """CuPy, if it is installed, is not found in this process."""
    monkeypatch.setitem(sys.modules, "cupy", None)


@pytest.fixture(scope="session")
def requires_gxx():
    """Skip the test if g++, which the CUDA emulator needs, is not available. In CI the test runs and fails instead."""
    if sys.platform != "linux" or (shutil.which("g++") is None and "CI" not in os.environ):
        pytest.skip("needs g++ on Linux")


@pytest.fixture
def tiny_config(tmp_path):
    """The config file of a model that trains in milliseconds."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(huggingface_config.config_to_dict(ModelConfig(32, 67, 2, 2, 16))))
    return path


@pytest.fixture
def tiny_data(tmp_path):
    """A directory with two training shards and one validation shard of random tokens."""
    generator = np.random.default_rng(0)
    for name, count in (("train_0", 700), ("train_1", 500), ("val_0", 300)):
        write_shard(tmp_path / f"tiny_{name}.bin", generator.integers(0, 67, count))
    return tmp_path


@pytest.fixture
def tiny_options(tiny_config, tiny_data):
    """Options of a run that uses every feature whose state a resumed run must restore."""
    return TrainOptions(
        model=str(tiny_config),
        data=str(tiny_data / "tiny_train_*.bin"),
        val_data=str(tiny_data / "tiny_val_*.bin"),
        out=tiny_data / "out",
        batch=2,
        seq_len=16,
        total_batch=64,
        steps=20,
        schedule="cosine",
        lr=1e-2,
        warmup=5,
        lr_final=0.1,
        weight_decay=0.1,
        skip_loss_z=1.5,
        skip_grad_z=1.5,
        val_every=5,
        val_steps=3,
        sample_every=0,
        clip=0.5,
    )


@pytest.fixture
def options_with(tiny_options):
    """A function that returns ``tiny_options`` with some fields replaced."""
    return lambda **changes: dataclasses.replace(tiny_options, **changes)
