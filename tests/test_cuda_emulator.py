"""The emulator of CUDA: what kernels may do works as on a GPU, and what they must not do is found and named."""

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import emulator
from cuda_emulator.emulator import EmulatorError, Program

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or (shutil.which("g++") is None and "CI" not in os.environ),
    reason="needs g++ on Linux: where tests run for CI it must be there",
)

HERE = Path(__file__).parent / "cuda_emulator"
RIGHT = (HERE / "right.cu").read_text()
WRONG = (HERE / "wrong.cu").read_text()


def compiled(source, check=True):
    return Program(source, ("-DSCALE=2.5f", "-arch=sm_90"), check)


@pytest.fixture(scope="module", params=(False, True), ids=("fast", "checked"))
def features(request):
    return compiled(RIGHT, request.param)


@pytest.fixture(scope="module")
def faults():
    return compiled(WRONG)


@pytest.fixture(params=(None, 1, 2))
def order(request):
    emulator.schedule(request.param)
    yield
    emulator.schedule(None)


@pytest.fixture
def device():
    """device(array) -> the same array, as memory of the device."""
    with contextlib.ExitStack() as stack:
        kept = []

        def register(array):
            kept.append(array)  # its memory must not be another's before it is unregistered
            emulator.register(array.ctypes.data, array.nbytes)
            stack.callback(emulator.unregister, array.ctypes.data)
            return array

        yield register


def launch(program, name, grid, block, *args, shared=0):
    args = [arg.ctypes.data if isinstance(arg, np.ndarray) else arg for arg in args]
    args = [np.int32(arg) if kind == "i4" else arg for kind, arg in zip(program.signature(name), args, strict=True)]
    program.launch(name, grid, block, args, shared)


def random(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape, np.float32)


def rounded(x):
    """float32 to the bits of bf16, to nearest even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


# ---- What kernels may do


def test_sums_of_rows(features, device, order):
    x, out = device(random(5, 1000)), device(np.empty(5, np.float32))
    for threads in (32, 64, 256):
        out.fill(np.nan)
        launch(features, "row_sums", (5,), (threads,), out, x, 1000)
        assert np.allclose(out, x.sum(1), atol=1e-4)


@pytest.mark.parametrize("width", [32, 8])
def test_operations_of_warps(features, device, order, width):
    out, lane = device(np.empty((10, 32), np.int32)), np.arange(32)
    first = lane // width * width
    launch(features, "warps", (1,), (32,), out, width)
    assert np.array_equal(out[0], first + 5)
    assert np.array_equal(out[1], np.where(lane - 3 < first, lane, lane - 3))
    assert np.array_equal(out[2], np.where(lane + 3 >= first + width, lane, lane + 3))
    assert np.array_equal(out[3], np.where((lane ^ 17) >= first + width, lane, lane ^ 17))
    assert (out[4].view(np.uint32) == sum(1 << i for i in range(0, 32, 3))).all()
    assert (out[5] == 1).all()
    assert (out[6] == 1).all()
    assert np.array_equal(out[7], np.minimum(lane + 1, 31) * 4 + 1)
    assert np.array_equal(out[8].view(np.uint32), np.where(lane < 16, 0xAAAA, 0xAAAA0000))
    assert np.array_equal(out[9], 31 - lane)


def test_counts_at_barriers(features, device, order):
    out = device(np.empty(100, np.int32))
    launch(features, "counts", (1,), (100,), out)
    assert (out == 1 + 2 + 100 * 34).all()


def test_dynamic_shared_memory(features, device, order):
    x, out = device(random(3, 60)), device(np.empty((3, 60), np.float32))
    launch(features, "reverse", (1, 1, 3), (20, 3), out, x, shared=240)
    assert np.array_equal(out, x[:, ::-1])


def test_vectors(features, device, order):
    x, out = device(random(50, 4)), device(np.empty((50, 4), np.float32))
    index = device(np.random.default_rng(0).integers(0, 50, (50, 2), np.int32))
    words = device(random(50, 4))
    launch(features, "vectors", (4,), (16,), out, x, index, words, 50)
    of = x[index[:, 0]]
    assert np.allclose(out, np.stack([of[:, 3], of.sum(1), words[:, 2], index[:, 1]], 1), atol=1e-6)


@pytest.mark.parametrize("n", [64, 70, 96])
def test_threads_may_leave_early(features, device, order, n):
    out = device(np.zeros(96, np.float32))
    launch(features, "leaving", (2,) if not features.check else (1,), (96,), out, n)
    backward = np.arange(n - 1, -1, -1, dtype=np.float32)
    expected = np.concatenate([np.repeat(backward[:64].reshape(2, 32).sum(1), 32), backward[64:]])
    assert np.array_equal(out, np.pad(expected, (0, 96 - n)))


def test_types_and_mathematics(features, device):
    out = device(np.empty(7))
    args = (out.ctypes.data, np.float32(1.5), np.int64(-(2**40)), np.int32(-3))
    features.launch("types", (1,), (1,), args)
    expected = [1.5, -(2**40), -3, -np.inf, 9.5, np.tanh(0.5) + np.e + 0.5, 8 + 31 + 4 + 1]
    assert np.allclose(out, expected, rtol=1e-7)
    assert features.signature("types") == ["P", "f4", "i8", "i4"]


def test_exchange_within_warps(features, device, order):
    out = device(np.empty(64, np.int32))
    launch(features, "within_warps", (1,), (64,), out)
    assert np.array_equal(out, (np.arange(64) ^ 31) + 2)


@pytest.mark.parametrize("n", [1, 32, 33, 64])
def test_reads_that_are_not_due_are_not_made(features, device, order, n):
    x, out = device(random(n)), device(np.empty(64, np.float32))
    launch(features, "where_due", (1,), (64,), out, x, n)
    expected = np.pad(x, (0, 64 - n)) + x @ x
    expected += x[32] if n > 32 else 0
    expected += 4 * x[63] if n == 64 else 0
    assert np.allclose(out, expected, atol=1e-4)


def test_halves_of_a_word(features, device, order):
    x, out = device(np.arange(64, dtype=np.uint16)), device(np.empty((32, 2), np.uint16))
    launch(features, "halves", (1,), (64,), out, x)
    assert np.array_equal(out, x.reshape(32, 2)[::-1])


def test_options_define(features, device):
    out = device(np.empty(64, np.float32))
    launch(features, "scaled", (1,), (64,), out)
    assert (out == 2.5).all()


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_asynchronous_copies(features, device, order, tiles):
    x, out = device(random(tiles, 128)), device(np.empty(32, np.float32))
    launch(features, "pipeline", (1,), (32,), out, x, tiles)
    assert np.allclose(out, x.reshape(tiles, 32, 4)[:, ::-1].sum((0, 2)), atol=1e-5)


def test_copies_of_nothing_are_zeros(features, device):
    out = device(np.ones(128, np.float32))
    launch(features, "zeros", (1,), (32,), out, shared=512)
    assert not out.any()


def test_products(features, device, order):
    a, b, c = rounded(random(16, 16)), rounded(random(8, 16, 1)), random(16, 8, 1, 1)
    expected = c[:, :, 0, 0] + widened(a) @ widened(b[:, :, 0]).T
    launch(features, "product", (1,), (32,), device(c), device(a), device(b))
    assert np.allclose(c[:, :, 0, 0], expected, atol=1e-5)


def test_matrices(features, device, order):
    x, out = device(np.arange(256, dtype=np.uint16).reshape(4, 8, 8)), device(np.empty((32, 4), np.uint32))
    for transposed in (0, 1):
        launch(features, "matrices", (1,), (32,), out, x, 0, transposed, shared=512)
        # of a matrix, row l // 4 and two neighbours of it go to lane l
        pairs = np.ascontiguousarray(x.transpose(0, 2, 1) if transposed else x).view(np.uint32)
        assert np.array_equal(out, pairs.reshape(4, 32).T)


def test_conflicts_between_banks_are_counted(features, device):
    x, out = device(np.zeros((4, 8, 8), np.uint16)), device(np.empty((32, 4), np.uint32))
    for padding, conflicts in ((0, 0), (8, 4), (56, 4), (64, 0)):
        emulator.counters()
        launch(features, "matrices", (1,), (32,), out, x, padding, 0, shared=32 * 2 * (8 + padding))
        counted = emulator.counters()
        assert (counted["ldmatrix_phases"], counted["ldmatrix_conflicts"]) == (4, conflicts), padding


def test_addresses_in_static_shared_memory(features, device):
    out = device(np.empty(32, np.int32))
    launch(features, "of_static_shared", (1,), (32,), out)
    assert np.array_equal(out, np.arange(32, 64) + 127)


# ---- What they must not


def line(source, name, mark="HERE"):
    """The words by which an error names the line of a kernel that bears a mark."""
    lines = source.splitlines()
    start = next(i for i, text in enumerate(lines) if f"void {name}(" in text)
    number = next(i for i in range(start, len(lines)) if f"// {mark}" in lines[i])
    return f"program.cu:{number + 1} `{lines[number].strip()}`"


def found(program, source, name, *args, grid=1, block=64, shared=0):
    """The error of a launch, which names kernel and line."""
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
def test_races_in_a_block(faults, device, order, name):
    block = 32 if name in ("race_of_halves", "race_past_a_shuffle") else 64
    kind, message = found(faults, WRONG, name, device(np.zeros(64, np.float32)), block=block)
    assert kind == "race"
    assert "no barrier lies between" in message
    assert ("byte 4 of a buffer of 256" if name == "race_in_global" else "shared cell") in message


@pytest.mark.parametrize("name", ["race_of_blocks", "race_of_a_reading_block"])
def test_races_of_blocks(faults, device, order, name):
    kind, message = found(faults, WRONG, name, device(np.zeros(64, np.float32)), grid=3)
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
def test_accesses_out_of_bounds(faults, device, order, name, args, words):
    kind, message = found(faults, WRONG, name, device(np.zeros(64, np.float32)), *args, shared=128)
    assert kind == "out of bounds"
    assert re.search(words, message)


def test_a_copy_from_out_of_bounds(faults, device):
    x = device(np.zeros(64, np.float32))
    kind, message = found(faults, WRONG, "copy_past_a_buffer", device(np.zeros(64, np.float32)), x, 64)
    assert kind == "out of bounds"
    assert "read of 16 bytes at byte 256 of a buffer of 256" in message


@pytest.mark.parametrize("name", ["misaligned", "misaligned_whole", "copy_misaligned", "row_misaligned"])
def test_misaligned_addresses(faults, device, order, name):
    out = device(np.zeros((64, 4), np.float32))
    args = () if name == "row_misaligned" else (device(np.zeros(512, np.float32)),)
    kind, _ = found(faults, WRONG, name, out, *args, block=32, shared=512)
    assert kind == "misaligned"


@pytest.mark.parametrize("name", ["uninitialised", "uninitialised_since_another_block", "row_uninitialised"])
def test_shared_memory_that_no_one_wrote(faults, device, order, name):
    out = device(np.zeros(128, np.float32))
    kind, message = found(faults, WRONG, name, out, grid=2, block=32 if name[0] == "r" else 64, shared=1024)
    assert kind == "uninitialised"
    assert ("shared cells + 160" if name == "uninitialised" else "dynamic shared memory + ") in message


def test_barriers_that_diverge(faults, device, order):
    kind, message = found(faults, WRONG, "divergent", device(np.zeros(64, np.float32)))
    assert kind == "divergent barrier"
    assert line(WRONG, "divergent", "THERE") in message


def test_deadlocks(faults, device, order):
    kind, message = found(faults, WRONG, "deadlock", device(np.zeros(64, np.float32)), block=32)
    assert kind == "deadlock"
    assert "16 from (0,0,0) on in a shuffle, " in message
    assert "16 from (16,0,0) on in a barrier, " in message
    assert line(WRONG, "deadlock", "THERE") in message


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
def test_operations_of_wrong_warps(faults, device, order, name, block, args, words):
    kind, message = found(faults, WRONG, name, device(np.zeros(64, np.float32)), *args, block=block)
    assert kind == "warp"
    assert words in message


def test_a_copy_of_no_group(faults, device, order):
    x = device(np.zeros(256, np.float32))
    kind, message = found(faults, WRONG, "not_waited_for", device(np.zeros(64, np.float32)), x)
    assert kind == "in flight"
    assert line(WRONG, "not_waited_for", "THERE") in message


@pytest.mark.parametrize(
    ("right", "wrong", "kind"),
    [
        ("emulator_cp_wait(1); // WAIT", "", "in flight"),
        ("emulator_cp_wait(1); // WAIT", "emulator_cp_wait(2);", "in flight"),
        ("__syncthreads(); // ARRIVED", "", "race|uninitialised|in flight"),
        ("__syncthreads(); // FREE", "", "race|in flight"),
    ],
)
def test_faults_of_a_pipeline(device, order, right, wrong, kind):
    program = compiled(RIGHT.replace(right, wrong))
    x, out = device(random(5, 128)), device(np.empty(32, np.float32))
    with pytest.raises(EmulatorError, match=f"^({kind}): pipeline, block"):
        launch(program, "pipeline", (1,), (32,), out, x, 5)


@pytest.mark.parametrize(("name", "n"), [("shifted", 33), ("overflown", 65536), ("divided", 64)])
def test_arithmetic(faults, device, name, n):
    kind, _ = found(faults, WRONG, name, device(np.zeros(64, np.int32)), n)
    assert kind == "arithmetic"


def test_without_the_check_uninitialised_memory_is_nan(device):
    program, out = compiled(WRONG, check=False), device(np.zeros(64, np.float32))
    for _ in range(2):
        launch(program, "uninitialised", (1,), (64,), out)
        assert np.flatnonzero(np.isnan(out)) == [40]


def test_a_fault_does_not_outlast_its_launch(faults, features, device):
    out = device(np.zeros(64, np.float32))
    for _ in range(3):
        found(faults, WRONG, "divergent", out)
        launch(features, "scaled", (1,), (64,), out)


# ---- Launches

POINTER, N = 4096, np.int32(1)


@pytest.mark.parametrize(
    ("name", "grid", "block", "args", "shared", "words"),
    [
        ("none", (1,), (1,), (), 0, "no kernel none"),
        ("row_sums", (1,), (257,), (POINTER, POINTER, N), 0, "a block of 257 threads, where 256 are allowed"),
        ("scaled", (1,), (65,), (POINTER,), 0, "a block of 65 threads, where 64 are allowed"),
        ("reverse", (1,), (64, 17), (POINTER, POINTER), 0, "a block of 1088 threads, where 1024 are allowed"),
        ("reverse", (1,), (1, 1, 65), (POINTER, POINTER), 0, "no block is"),
        ("reverse", (0,), (1,), (POINTER, POINTER), 0, "no grid is"),
        ("reverse", (1, 65536), (1,), (POINTER, POINTER), 0, "no grid is"),
        ("reverse", (1, 1, 1, 1), (1,), (POINTER, POINTER), 0, "no grid is"),
        ("reverse", (), (1,), (POINTER, POINTER), 0, "no grid is"),
        ("reverse", (1,), (1,), (POINTER, POINTER), 227 * 1024 + 1, "232449 bytes of shared memory"),
        ("reverse", (1,), (1,), (POINTER,), 0, "1 arguments, where it takes 2"),
        ("reverse", (1,), (1,), (POINTER, N), 0, "argument 1 is a pointer, as int, not int32"),
        ("warps", (1,), (32,), (POINTER, 1), 0, "argument 1 is a np.int32, not int"),
        ("warps", (1,), (32,), (POINTER, np.int64(1)), 0, "argument 1 is a np.int32, not int64"),
        ("types", (1,), (1,), (POINTER, 1.0, np.int64(1), N), 0, "argument 1 is a np.float32, not float"),
        ("types", (1,), (1,), (POINTER, np.float32(1), N, N), 0, "argument 2 is a np.int64, not int32"),
    ],
)
def test_launches_that_a_gpu_would_refuse(features, name, grid, block, args, shared, words):
    with pytest.raises(EmulatorError, match=r"^launch: ") as caught:
        features.launch(name, grid, block, args, shared)
    assert words in str(caught.value)


# ---- Sources, memory


@pytest.mark.parametrize(
    "body",
    [
        "out[0] = INFINITY;",
        "out[0] = std::sqrt(2.0f);",
        "int32_t x = 1; out[0] = x;",
        "float x; out[0] = x + 1.0f;",
        "extern __shared__ float s; out[0] = s;",
    ],
)
def test_what_nvrtc_does_not_take(body):
    with pytest.raises(EmulatorError, match=r"fault\.cu:7"):
        Program(f'#line 6 "fault.cu"\nextern "C" __global__ void f(float* out) {{\n{body}\n}}\n')


def test_arguments_of_other_types():
    with pytest.raises(EmulatorError, match="a kernel takes pointers, int, long long and float"):
        Program('extern "C" __global__ void f(double x) {}')


def test_errors_name_lines_as_the_source_does(device):
    source = """#line 1 "first.cuh"
    __device__ __forceinline__ void set(float* x, int i) {
        x[i] = 1.0f;
    }
#line 1 "second.cu"
    extern "C" __global__ void f(float* out) {

        set(out, threadIdx.x);
    }
"""
    program, out = Program(source, check=True), device(np.zeros(2, np.float32))
    with pytest.raises(EmulatorError) as caught:
        launch(program, "f", (1,), (3,), out)
    assert str(caught.value) == (
        "out of bounds: f, block (0,0,0), thread (2,0,0), "
        "first.cuh:2 `x[i] = 1.0f;`, called from second.cu:3 `set(out, threadIdx.x);`: "
        "write of 4 bytes at byte 8 of a buffer of 8"
    )


def test_memory_is_registered_once(device):
    memory = device(np.zeros(8, np.float32))
    for offset in (0, 4, -4):
        with pytest.raises(EmulatorError, match="overlap"):
            emulator.register(memory.ctypes.data + offset, 8)
    with pytest.raises(EmulatorError, match="no memory is registered"):
        emulator.unregister(memory.ctypes.data + 4)


def test_orders_differ_by_seed(features, device):
    """Which of several threads comes last shows in what none of them may share: here it may, as nothing is checked."""
    program, last = compiled(WRONG, check=False), set()
    out = device(np.zeros(64, np.float32))
    for seed in (None, 1, 2, 3, 1):
        emulator.schedule(seed)
        launch(program, "race_of_writes", (1,), (64,), out)
        last.add(out[0])
    emulator.schedule(None)
    assert len(last) == 4


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulatorError, match=r"g\+\+"):
        emulator._compiler.__wrapped__()
