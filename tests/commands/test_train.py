"""``llmc train`` in a subprocess."""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

LINE = re.compile(
    r"step \d+/\d+ \| loss \d+\.\d{6} \| norm \d+\.\d{4} \| lr \d\.\d\de-\d\d \| \d+\.\d ms \| \d+ tok/s \| \d+% MFU"
)
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no POSIX signals")


@pytest.fixture
def arguments(tiny_config, tiny_data):
    return [
        "--model", str(tiny_config), "-i", str(tiny_data / "tiny_train_*.bin"), "-j", str(tiny_data / "tiny_val_*.bin"),
        "-b", "2", "-t", "16", "-d", "64", "-x", "20", "-v", "5", "-m", "2", "-s", "0", "-l", "0.01", "-u", "3",
        "-q", "0.1", "--threads", "1",
    ]  # fmt: skip


def command(*arguments):
    return [sys.executable, "-m", "llmc_cli.app", "train", *map(str, arguments)]


def train(*arguments, **options):
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=120, **options)


def start(*arguments):
    """Start a run and return its process after its first step."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    for line in process.stdout:
        if line.startswith("step"):
            break
    return process


def losses(stdout):
    return re.findall(r"step (\d+)/\d+ \| loss (\S+)", stdout)


def test_one_line_per_step(arguments, tmp_path):
    run = train(*arguments, "--out", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert all(LINE.fullmatch(line) or re.fullmatch(r"val loss \d+\.\d{6}", line) for line in lines)
    assert [step for step, _ in losses(run.stdout)] == [str(step) for step in range(1, 21)]
    assert sum(line.startswith("val") for line in lines) == 5
    assert "\x1b" not in run.stdout + run.stderr
    assert "parameters" in run.stderr
    assert (tmp_path / "out" / "DONE_00000020").exists()


def test_json_lines_of_all_reports(arguments, tmp_path):
    run = train(*arguments, "--json", "--quiet", "-s", "10", "-g", "4", "--out", tmp_path / "out")
    assert (run.returncode, run.stderr) == (0, "")
    events = [json.loads(line) for line in run.stdout.splitlines()]
    assert all(event["schema"] == 1 for event in events)
    steps = [event for event in events if "loss" in event]
    assert [set(event) for event in steps] == 20 * [
        {"schema", "step", "loss", "norm", "lr", "ms", "tokens_per_s", "mfu"}
    ]
    assert [event["step"] for event in events if "val_loss" in event] == [0, 5, 10, 15, 20]
    assert [len(event["sample"]) for event in events if "sample" in event] == [3, 3]
    assert [event["step"] for event in events if "checkpoint" in event] == [20]


def test_dry_run_prints_the_plan_and_writes_nothing(arguments, tmp_path):
    run = train(*arguments, "--dry-run", "--out", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    rows = dict(line.split("\t") for line in run.stdout.splitlines()[1:])
    assert rows["parameters"] == "9,152"  # by hand: 128·16 + 32·16 + 2·3,280 + 32
    assert rows["batch"] == "2 x 16 x 2 = 64 tokens per step"
    assert "precision" in rows and "expected time" in rows and "memory: total" in rows
    assert not (tmp_path / "out").exists()
    plan = json.loads(train(*arguments, "--dry-run", "--json").stdout)
    assert (plan["schema"], plan["steps"], plan["total_memory"]) == (1, 20, sum(plan["memory"].values()))


def test_command_line_of_llm_c(arguments, tiny_data, tmp_path):
    """All options of llm.c, written as in its scripts."""
    run = train(
        "-i", tiny_data / "tiny_train_*.bin", "-j", tiny_data / "tiny_val_*.bin", "-e", arguments[1],
        "-o", tmp_path / "log", "-v", "250", "-s", "20000", "-g", "144", "-h", "0", "-b", "2", "-t", "16", "-d", "64",
        "-r", "0", "-z", "1", "-c", "0.1", "-k", "cosine", "-l", "0.0006", "-q", "0.0", "-u", "700", "-n", "5000",
        "-nk", "5", "-nm", "50000", "-ge", "1", "-y", "1", "-x", "3", "-sl", "7.0", "-sg", "7.0", "-lg", "-1",
        "-m", "20", "-a", "0", "-w", "1", "-pn", "1", "-pr", "0", "-pg", "8", "-pi", "mpi", "-ps", "", "-pf", "",
    )  # fmt: skip
    # everything is accepted except a sample of 144 tokens from a model of 32 positions
    assert run.returncode == 2
    assert "--sample-tokens 144" in run.stderr


def test_run_without_out_warns(arguments):
    run = train(*arguments, "-x", "1")
    assert "without --out, no checkpoint or log of this run is saved" in run.stderr


def test_missing_data_names_the_command_that_writes_them(tmp_path):
    run = train(cwd=tmp_path)
    assert (run.returncode, run.stdout) == (3, "")
    assert "llmc prepro" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("more", "status", "text"),
    [
        (["-h", "1"], 4, "HellaSwag"),
        (["-pn", "2"], 4, "--num-processes 2: multi-process training is not implemented yet; expected 1"),
        (["-pr", "1"], 4, "--process-rank 1: multi-process training is not implemented yet; expected 0"),
        (["-z", "2"], 4, "--zero 2"),
        (["-f", "1"], 4, "tf32"),
        (["--device", "cuda:99"], 4, "--device cuda"),
        (["--precision", "tf32"], 4, "tf32"),
        (["-b", "0"], 2, "--batch"),
        (["-d", "65"], 2, "--total-batch 65"),
        (["-e", "d13"], 2, "d84"),
        (["-y", "1"], 2, "--out"),
        (["--bogus"], 2, "--bogus"),
    ],
)
def test_refused_options(arguments, more, status, text):
    run = train(*arguments, *more)
    assert (run.returncode, run.stdout) == (status, "")
    assert text in run.stderr
    assert "Traceback" not in run.stderr


def test_damaged_model_is_refused(arguments, tmp_path):
    (tmp_path / "model.bin").write_bytes(b"not a model")
    run = train(*arguments, "-e", tmp_path / "model.bin")
    assert (run.returncode, run.stdout) == (3, "")
    assert "model.bin" in run.stderr


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux reports the exact peak memory of a process"
)
@pytest.mark.parametrize("recompute", ["0", "2"])
def test_planned_memory_is_the_peak(arguments, tmp_path, tiny_config, recompute):
    """Within 5 %, for a model that needs more memory than the program itself."""
    config = json.loads(tiny_config.read_text())
    tiny_config.write_text(json.dumps({**config, "n_embd": 256, "n_layer": 8, "vocab_size": 20_000}))
    arguments = [*arguments, "-b", "8", "-t", "32", "-d", "256", "-x", "2", "-r", recompute]
    plan = json.loads(train(*arguments, "--dry-run", "--json").stdout)
    program = (
        "import sys\nfrom llmc_cli import app\nfrom llmc_cli.machine import memory\n"
        "sys.argv = ['llmc', 'train', *sys.argv[1:]]\n"
        "try:\n    app.main()\nexcept SystemExit:\n    print(memory.peak_memory())"
    )
    run = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert plan["total_memory"] == pytest.approx(int(run.stdout.splitlines()[-1]), rel=0.05)


@posix
@pytest.mark.parametrize(("signum", "status"), [(15, 143), (2, 130), (1, 129)])
def test_signal_saves_and_the_resumed_run_is_identical(arguments, tmp_path, signum, status):
    arguments = [*arguments, "-x", "1500"]
    process = start(*arguments, "--out", tmp_path / "cut")
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    (done,) = (tmp_path / "cut").glob("DONE_*")
    stopped_at = int(done.name[5:])
    assert 1 <= stopped_at < 1500
    second = train(*arguments, "--out", tmp_path / "cut", "-y", "1")
    assert second.returncode == 0, second.stderr
    whole = train(*arguments, "--out", tmp_path / "whole")
    assert losses(second.stdout) == losses(whole.stdout)[stopped_at:]
    for name in ("model_00001500.bin", "state_00001500_00000.bin", "main.log"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@posix
def test_broken_pipe_saves_and_exits_quietly(arguments, tmp_path):
    more = "-x", "2000", "--quiet", "--out", tmp_path / "out"
    process = subprocess.Popen(command(*arguments, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == ""
    process.stderr.close()
    assert len(list((tmp_path / "out").glob("DONE_*"))) == 1


@pytest.mark.soak
@posix
def test_resume_after_kill_at_a_random_moment(arguments, tmp_path):
    """20 runs killed at random moments and resumed equal an uninterrupted run."""
    arguments = [*arguments, "-x", "120", "-n", "3"]
    whole = train(*arguments, "--out", tmp_path / "whole")
    expected = (tmp_path / "whole" / "model_00000120.bin").read_bytes()
    generator = random.Random(0)
    for trial in range(20):
        folder = tmp_path / f"cut_{trial}"
        process = start(*arguments, "--out", folder)
        time.sleep(generator.uniform(0, 1.0))
        process.kill()
        process.communicate()
        steps = [int(path.name[5:]) for path in folder.glob("DONE_*")]
        second = train(*arguments, "--out", folder, "-y", "1")
        assert second.returncode == 0, second.stderr
        assert losses(second.stdout) == losses(whole.stdout)[max(steps, default=0) :]
        assert (folder / "model_00000120.bin").read_bytes() == expected
        assert (folder / "main.log").read_bytes() == (tmp_path / "whole" / "main.log").read_bytes()
        assert not list(Path(folder).glob(".*.part"))
