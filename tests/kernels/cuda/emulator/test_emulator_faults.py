"""The CUDA emulator reports faulty kernels with the source line of the fault."""

import re

import numpy as np
import pytest
from support.cuda_emulator.emulator import EmulatorError
from support.emulated_programs import CORRECT, FAULTY, ORDERS, compiled, launch, memory, ordered, random

pytestmark = pytest.mark.usefixtures("requires_gxx")


@pytest.fixture(scope="module")
def faults(requires_gxx):
    return compiled(FAULTY)


@pytest.fixture(params=ORDERS)
def order(request):
    with ordered(request.param):
        yield


@pytest.fixture
def device():
    with memory() as register:
        yield register


def line(source, name, mark="HERE"):
    """Return the marked line of a kernel as it appears in error messages."""
    lines = source.splitlines()
    start = next(i for i, text in enumerate(lines) if f"void {name}(" in text)
    number = next(i for i in range(start, len(lines)) if f"// {mark}" in lines[i])
    return f"program.cu:{number + 1} `{lines[number].strip()}`"


def launch_error(program, source, name, *args, grid=1, block=64, shared=0):
    """Launch a faulty kernel, check that the error names the kernel and line, and return its kind and message."""
    with pytest.raises(EmulatorError) as caught:
        launch(program, name, (grid,), (block,), *args, shared=shared)
    message = str(caught.value)
    kind, place, *_ = message.split(": ", 1)
    assert place.startswith(f"{name}, block ")
    assert line(source, name) in message
    return kind, message


RACES = ["race", "race_of_writes", "race_after_reading", "race_of_warps", "race_of_halves", "race_past_a_shuffle"]
RACES += ["race_in_global"]


@pytest.mark.parametrize("name", RACES)
def test_races_within_a_block(faults, device, order, name):
    block = 32 if name in ("race_of_halves", "race_past_a_shuffle") else 64
    kind, message = launch_error(faults, FAULTY, name, device(np.zeros(64, np.float32)), block=block)
    assert kind == "race"
    assert "no barrier lies between" in message
    assert ("byte 4 of a buffer of 256" if name == "race_in_global" else "shared cell") in message


@pytest.mark.parametrize("name", ["race_of_blocks", "race_of_a_reading_block"])
def test_races_between_blocks(faults, device, order, name):
    kind, message = launch_error(faults, FAULTY, name, device(np.zeros(64, np.float32)), grid=3)
    assert kind == "race"
    assert re.search(r"which thread \(\d+,0,0\) of block \(\d,0,0\) (wrote|read) in ", message)


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("past_a_buffer", (64,), "write of 4 bytes at byte 256 of a buffer of 256"),
        ("before_a_buffer", (), "write of 4 bytes that begins 4 before a buffer"),
        ("null", (0,), r"read of 4 bytes at address 0\w*, where no memory is"),
        ("past_dynamic", (), r"write of 4 bytes at \d+ of 128 bytes of dynamic shared memory"),
        ("past_static", (), r"index \d+ of an array"),
        ("past_registers", (5,), "index 4 of an array"),
    ],
)
def test_out_of_bounds_accesses(faults, device, order, name, args, words):
    kind, message = launch_error(faults, FAULTY, name, device(np.zeros(64, np.float32)), *args, shared=128)
    assert kind == "out of bounds"
    assert re.search(words, message)


def test_out_of_bounds_copy(faults, device):
    x = device(np.zeros(64, np.float32))
    kind, message = launch_error(faults, FAULTY, "copy_past_a_buffer", device(np.zeros(64, np.float32)), x, 64)
    assert kind == "out of bounds"
    assert "read of 16 bytes at byte 256 of a buffer of 256" in message


@pytest.mark.parametrize("name", ["misaligned", "misaligned_whole", "copy_misaligned", "row_misaligned"])
def test_misaligned_addresses(faults, device, order, name):
    out = device(np.zeros((64, 4), np.float32))
    args = () if name == "row_misaligned" else (device(np.zeros(512, np.float32)),)
    kind, _ = launch_error(faults, FAULTY, name, out, *args, block=32, shared=512)
    assert kind == "misaligned"


@pytest.mark.parametrize("name", ["uninitialised", "uninitialised_since_another_block", "row_uninitialised"])
def test_uninitialized_shared_memory(faults, device, order, name):
    out = device(np.zeros(128, np.float32))
    kind, message = launch_error(faults, FAULTY, name, out, grid=2, block=32 if name[0] == "r" else 64, shared=1024)
    assert kind == "uninitialised"
    assert ("shared cells + 160" if name == "uninitialised" else "dynamic shared memory + ") in message


def test_divergent_barriers(faults, device, order):
    kind, message = launch_error(faults, FAULTY, "divergent", device(np.zeros(64, np.float32)))
    assert kind == "divergent barrier"
    assert line(FAULTY, "divergent", "THERE") in message


def test_deadlocks(faults, device, order):
    kind, message = launch_error(faults, FAULTY, "deadlock", device(np.zeros(64, np.float32)), block=32)
    assert kind == "deadlock"
    assert "16 from (0,0,0) on in a shuffle, " in message
    assert "16 from (16,0,0) on in a barrier, " in message
    assert line(FAULTY, "deadlock", "THERE") in message


@pytest.mark.parametrize(
    ("name", "block", "args", "words"),
    [
        ("exited", 32, (20,), "exit"),
        ("unnamed", 32, (), "a vote whose mask 0000ffff does not name the calling lane"),
        ("from_unnamed", 32, (), "a shuffle reads lane 16, which its mask does not name"),
        ("from_nowhere", 48, (), "a shuffle reads lane 16, which the block does not have"),
        ("mixed", 32, (), "of the mask ffffffff is in"),
    ],
)
def test_invalid_warp_operations(faults, device, order, name, block, args, words):
    kind, message = launch_error(faults, FAULTY, name, device(np.zeros(64, np.float32)), *args, block=block)
    assert kind == "warp"
    assert words in message


def test_uncommitted_copy(faults, device, order):
    x = device(np.zeros(256, np.float32))
    kind, message = launch_error(faults, FAULTY, "not_waited_for", device(np.zeros(64, np.float32)), x)
    assert kind == "in flight"
    assert line(FAULTY, "not_waited_for", "THERE") in message


@pytest.mark.parametrize(
    ("right", "wrong", "kind"),
    [
        ("emulator_cp_wait(1); // WAIT", "", "in flight"),
        ("emulator_cp_wait(1); // WAIT", "emulator_cp_wait(2);", "in flight"),
        ("__syncthreads(); // ARRIVED", "", "race|uninitialised|in flight"),
        ("__syncthreads(); // FREE", "", "race|in flight"),
    ],
)
def test_faulty_pipelines(device, order, right, wrong, kind):
    program = compiled(CORRECT.replace(right, wrong))
    x, out = device(random(5, 128)), device(np.empty(32, np.float32))
    with pytest.raises(EmulatorError, match=f"^({kind}): pipeline, block"):
        launch(program, "pipeline", (1,), (32,), out, x, 5)


@pytest.mark.parametrize(("name", "n"), [("shifted", 33), ("overflown", 65536), ("divided", 64)])
def test_arithmetic_errors(faults, device, name, n):
    kind, _ = launch_error(faults, FAULTY, name, device(np.zeros(64, np.int32)), n)
    assert kind == "arithmetic"


def test_uninitialized_memory_is_nan_without_checks(device):
    program, out = compiled(FAULTY, check=False), device(np.zeros(64, np.float32))
    for _ in range(2):
        launch(program, "uninitialised", (1,), (64,), out)
        assert np.flatnonzero(np.isnan(out)) == [40]
