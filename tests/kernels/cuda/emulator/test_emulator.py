"""Supported features of the CUDA emulator, and launches and sources that a GPU would reject."""

import numpy as np
import pytest
from support.cuda_emulator import emulator
from support.cuda_emulator.emulator import EmulatorError, Program
from support.emulated_programs import CORRECT, FAULTY, ORDERS, compiled, launch, memory, ordered, random

pytestmark = pytest.mark.usefixtures("requires_gxx")

POINTER, N = 4096, np.int32(1)


@pytest.fixture(scope="module", params=(False, True), ids=("fast", "checked"))
def features(request, requires_gxx):
    return compiled(CORRECT, request.param)


@pytest.fixture(params=ORDERS)
def order(request):
    with ordered(request.param):
        yield


@pytest.fixture
def device():
    with memory() as register:
        yield register


def rounded(x):
    """Round float32 to nearest even and return the bits of bf16."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def test_block_sums(features, device, order):
    x, out = device(random(5, 1000)), device(np.empty(5, np.float32))
    for threads in (32, 64, 256):
        out.fill(np.nan)
        launch(features, "row_sums", (5,), (threads,), out, x, 1000)
        assert np.allclose(out, x.sum(1), atol=1e-4)


@pytest.mark.parametrize("width", [32, 8])
def test_warp_operations(features, device, order, width):
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


def test_barrier_reductions(features, device, order):
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
    rows = x[index[:, 0]]
    assert np.allclose(out, np.stack([rows[:, 3], rows.sum(1), words[:, 2], index[:, 1]], 1), atol=1e-6)


@pytest.mark.parametrize("n", [64, 70, 96])
def test_threads_may_exit_early(features, device, order, n):
    out = device(np.zeros(96, np.float32))
    launch(features, "leaving", (2,) if not features.check else (1,), (96,), out, n)
    backward = np.arange(n - 1, -1, -1, dtype=np.float32)
    expected = np.concatenate([np.repeat(backward[:64].reshape(2, 32).sum(1), 32), backward[64:]])
    assert np.array_equal(out, np.pad(expected, (0, 96 - n)))


def test_types_and_math_functions(features, device):
    out = device(np.empty(7))
    args = (out.ctypes.data, np.float32(1.5), np.int64(-(2**40)), np.int32(-3))
    features.launch("types", (1,), (1,), args)
    expected = [1.5, -(2**40), -3, -np.inf, 9.5, np.tanh(0.5) + np.e + 0.5, 8 + 31 + 4 + 1]
    assert np.allclose(out, expected, rtol=1e-7)
    assert features.signature("types") == ["P", "f4", "i8", "i4"]


def test_syncwarp_orders_accesses(features, device, order):
    out = device(np.empty(64, np.int32))
    launch(features, "within_warps", (1,), (64,), out)
    assert np.array_equal(out, (np.arange(64) ^ 31) + 2)


@pytest.mark.parametrize("n", [1, 32, 33, 64])
def test_no_speculative_reads(features, device, order, n):
    x, out = device(random(n)), device(np.empty(64, np.float32))
    launch(features, "where_due", (1,), (64,), out, x, n)
    expected = np.pad(x, (0, 64 - n)) + x @ x
    expected += x[32] if n > 32 else 0
    expected += 4 * x[63] if n == 64 else 0
    assert np.allclose(out, expected, atol=1e-4)


def test_two_byte_accesses(features, device, order):
    x, out = device(np.arange(64, dtype=np.uint16)), device(np.empty((32, 2), np.uint16))
    launch(features, "halves", (1,), (64,), out, x)
    assert np.array_equal(out, x.reshape(32, 2)[::-1])


def test_defines(features, device):
    out = device(np.empty(64, np.float32))
    launch(features, "scaled", (1,), (64,), out)
    assert (out == 2.5).all()


@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_asynchronous_copies(features, device, order, tiles):
    x, out = device(random(tiles, 128)), device(np.empty(32, np.float32))
    launch(features, "pipeline", (1,), (32,), out, x, tiles)
    assert np.allclose(out, x.reshape(tiles, 32, 4)[:, ::-1].sum((0, 2)), atol=1e-5)


def test_copy_from_null_writes_zeros(features, device):
    out = device(np.ones(128, np.float32))
    launch(features, "zeros", (1,), (32,), out, shared=512)
    assert not out.any()


def test_mma(features, device, order):
    a, b, c = rounded(random(16, 16)), rounded(random(8, 16, 1)), random(16, 8, 1, 1)
    expected = c[:, :, 0, 0] + widened(a) @ widened(b[:, :, 0]).T
    launch(features, "product", (1,), (32,), device(c), device(a), device(b))
    assert np.allclose(c[:, :, 0, 0], expected, atol=1e-5)


def test_ldmatrix(features, device, order):
    x, out = device(np.arange(256, dtype=np.uint16).reshape(4, 8, 8)), device(np.empty((32, 4), np.uint32))
    for transposed in (0, 1):
        launch(features, "matrices", (1,), (32,), out, x, 0, transposed, shared=512)
        # lane l receives two adjacent elements of row l // 4 of each matrix
        pairs = np.ascontiguousarray(x.transpose(0, 2, 1) if transposed else x).view(np.uint32)
        assert np.array_equal(out, pairs.reshape(4, 32).T)


def test_bank_conflicts_are_counted(features, device):
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
def test_invalid_launches(features, name, grid, block, args, shared, words):
    with pytest.raises(EmulatorError, match=r"^launch: ") as caught:
        features.launch(name, grid, block, args, shared)
    assert words in str(caught.value)


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
def test_source_rejected_by_nvrtc(body):
    with pytest.raises(EmulatorError, match=r"fault\.cu:7"):
        Program(f'#line 6 "fault.cu"\nextern "C" __global__ void f(float* out) {{\n{body}\n}}\n')


def test_unsupported_argument_types():
    with pytest.raises(EmulatorError, match="a kernel takes pointers, int, long long and float"):
        Program('extern "C" __global__ void f(double x) {}')


def test_errors_use_line_directives(device):
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


def test_overlapping_registration_is_an_error(device):
    memory = device(np.zeros(8, np.float32))
    for offset in (0, 4, -4):
        with pytest.raises(EmulatorError, match="overlap"):
            emulator.register(memory.ctypes.data + offset, 8)
    with pytest.raises(EmulatorError, match="no memory is registered"):
        emulator.unregister(memory.ctypes.data + 4)


def test_order_depends_on_seed(features, device):
    """An unchecked race of writes shows which thread runs last."""
    program, last = compiled(FAULTY, check=False), set()
    out = device(np.zeros(64, np.float32))
    for seed in (None, 1, 2, 3, 1):
        emulator.schedule(seed)
        launch(program, "race_of_writes", (1,), (64,), out)
        last.add(out[0])
    emulator.schedule(None)
    assert len(last) == 4


def test_launch_after_a_fault_succeeds(features, device):
    faults, out = compiled(FAULTY), device(np.zeros(64, np.float32))
    for _ in range(3):
        with pytest.raises(EmulatorError, match="divergent barrier"):
            launch(faults, "divergent", (1,), (64,), out)
        launch(features, "scaled", (1,), (64,), out)


def test_missing_compiler_is_an_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EmulatorError, match=r"g\+\+"):
        emulator._compiler.__wrapped__()
