"""CUDA kernels but for attention, on the emulator: against float64, the same bits in any order of blocks and threads,
and with faults planted in them, each of which must be noticed."""

import itertools
import os
import shutil
import sys
from typing import NamedTuple

import numpy as np
import pytest
from cuda_emulator import emulator

from llmc_cli.formats import bfloat16
from llmc_cli.kernel_cases import EMBEDDING, EPS, FLAT, HEAD, LINEAR, NORM, OPERATIONS, REFERENCE
from llmc_cli.kernels.cuda import classifier, elementwise, embedding, norm, optimizer
from llmc_cli.kernels.cuda.geometry import row_threads
from llmc_cli.kernels.cuda.source import source
from llmc_cli.kernels.reference.kernels import gelu, gelu_derivative

SCHEDULES = (None, 1, 2)
BF16 = 2.0**-8  # the bound on what is stored as bf16: half a unit in the last of its 8 bits, and as much for arithmetic


@pytest.fixture(scope="module", autouse=True)
def compiler():
    if sys.platform != "linux" or shutil.which("g++") is None:
        if os.environ.get("CI"):
            pytest.fail("the CUDA kernels are tested with g++ on Linux, which is not here")
        pytest.skip("needs g++ on Linux")


class EmulatedDevice:
    """What launches need of a device, with NumPy arrays for its memory. All of it is checked by the emulator.

    ``shift``: by how many elements arrays miss the alignment that accesses of 16 bytes need.
    """

    def __init__(self, bf16, shift=0, change=lambda text: text):
        self.real = np.uint16 if bf16 else np.float32
        self.shift, self.change = shift, change
        self.programs, self.arrays = {}, []

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for array in self.arrays:
            emulator.unregister(array.ctypes.data)

    def program(self, file):
        if file not in self.programs:
            options = ("-DREAL_BF16",) if self.real == np.uint16 else ()
            self.programs[file] = emulator.Program(self.change(source(file)), options, check=True)
        return self.programs[file]

    def launch(self, file, kernel, grid, block, args, shared=0):
        addresses = [0 if a is None else a.ctypes.data if isinstance(a, np.ndarray) else a for a in args]
        self.program(file).launch(kernel, grid, block, tuple(addresses), shared)

    def put(self, values, dtype):
        """Device memory with these values; where ``dtype`` is uint16 they are rounded to bf16."""
        values = np.asarray(values)
        itemsize = np.dtype(dtype).itemsize
        raw = np.empty(values.size * itemsize + 128, np.uint8)
        start = -raw.ctypes.data % 64 + self.shift * itemsize
        array = raw[start : start + values.size * itemsize].view(dtype).reshape(values.shape)
        if array.dtype == np.uint16:
            bfloat16.from_float32(np.ascontiguousarray(values, np.float32), array)
        else:
            array[...] = values
        emulator.register(array.ctypes.data, array.nbytes)
        self.arrays.append(array)
        return array

    def reals(self, values):
        return self.put(values, self.real)

    def floats(self, values):
        return self.put(values, np.float32)

    def ints(self, values):
        return self.put(values, np.int32)

    def unwritten(self, *shape, dtype=np.float32):
        return self.put(np.full(shape, np.nan), dtype)


class Result(NamedTuple):
    name: str
    found: np.ndarray  # on the device
    expected: np.ndarray
    bound: float  # on the error, relative to the largest number expected


def as_float(array):
    if array.dtype != np.uint16:
        return array.astype(np.float64)
    wide = np.empty(array.shape, np.float32)
    bfloat16.to_float32(array, wide)
    return wide.astype(np.float64)


def bounds(operation, *outputs):
    return [OPERATIONS[operation].bounds[name] for name in outputs]


def run(check, device, sizes):
    """``check`` under all schedules; AssertionError or EmulatorError where a kernel is wrong."""
    bits = set()
    for seed in SCHEDULES:
        emulator.schedule(seed)
        results = check(device, np.random.default_rng(0), **sizes)
        for name, found, expected, bound in results:
            limit = max(bound, BF16) if found.dtype == np.uint16 and bound > 0.0 else bound
            error = np.abs(as_float(found) - expected).max()
            largest = np.abs(expected).max()
            assert error <= limit * largest, f"{name}: error {error:.3g}, largest {largest:.3g}, bound {limit:.3g}"
        bits.add(b"".join(found.tobytes() for _, found, _, _ in results))
    assert len(bits) == 1, "other bits in another order of blocks and threads"


# Each check makes inputs, launches, and gives outputs beside what the reference makes of the inputs as stored.


def check_embedding_forward(device, rng, V, T, N, C):
    wte, wpe = device.floats(rng.standard_normal((V, C))), device.floats(rng.standard_normal((T, C)))
    ids, positions = device.ints(rng.integers(0, V, N)), device.ints(rng.integers(0, T, N))
    x, expected = device.unwritten(N, C, dtype=device.real), np.empty((N, C))
    embedding.embedding_forward(device, x, wte, wpe, ids, positions)
    REFERENCE.embedding_forward(expected, as_float(wte), as_float(wpe), ids, positions)
    return [Result("x", x, expected, *bounds("embedding_forward", "x"))]


def check_embedding_backward(device, rng, V, T, N, C, acc=False):
    dx = device.reals(rng.standard_normal((N, C)))
    ids, positions = device.ints(rng.integers(0, V, N)), device.ints(rng.integers(0, max(1, T - 1), N))
    dwte = device.floats(rng.standard_normal((V, C)))
    dwpe = device.floats(rng.standard_normal((T, C))) if acc else device.unwritten(T, C)
    expected = as_float(dwte), as_float(dwpe)
    embedding.embedding_backward(device, dwte, dx, ids)
    embedding.position_backward(device, dwpe, dx, positions, acc)
    REFERENCE.embedding_backward(*expected, as_float(dx), ids, positions, acc)
    dwte_bound, dwpe_bound = bounds("embedding_backward", "dwte", "dwpe")
    return [Result("dwte", dwte, expected[0], dwte_bound), Result("dwpe", dwpe, expected[1], dwpe_bound)]


def check_norm_forward(device, rng, N, C, delta=True, bias=True, in_place=False):
    x = device.reals(rng.standard_normal((N, C)) * 3 + 2)
    before, more = as_float(x), device.reals(rng.standard_normal((N, C)) + 2) if delta else None
    w, b, added = (device.floats(rng.standard_normal(C)) for _ in range(3))
    y, mean, rstd = device.unwritten(N, C, dtype=device.real), device.unwritten(N), device.unwritten(N)
    res = x if in_place else device.unwritten(N, C, dtype=device.real)
    norm.residual_norm_forward(device, res, y, mean, rstd, x, more, added if bias else None, w, b, EPS)
    if not delta:
        assert np.isnan(as_float(res)).all()
    normalized = as_float(res if delta else x)  # what is normalized is the sum as it is stored
    expected = np.empty((N, C)), np.empty(N), np.empty(N)
    REFERENCE.residual_norm_forward(normalized, *expected, normalized, None, None, as_float(w), as_float(b), EPS)
    res_bound, *others = bounds("residual_norm_forward", "res", "y", "mean", "rstd")
    outputs = zip(("y", "mean", "rstd"), (y, mean, rstd), expected, others, strict=True)
    results = [Result(*output) for output in outputs]
    if not delta:
        return results
    return [*results, Result("res", res, before + as_float(more) + as_float(added) * bias, res_bound)]


def check_norm_backward(device, rng, N, C, acc=False, dres=True, into=None):
    """``into``: the input whose memory dx takes."""
    res, dy = device.reals(rng.standard_normal((N, C)) * 3 + 2), device.reals(rng.standard_normal((N, C)))
    past = device.reals(rng.standard_normal((N, C))) if dres else None
    w = device.floats(rng.standard_normal(C))
    exact = as_float(res)
    mean = device.floats(exact.mean(axis=1))
    rstd = device.floats(1 / np.sqrt(exact.var(axis=1) + EPS))
    dw, db = (device.floats(rng.standard_normal(C)) if acc else device.unwritten(C) for _ in range(2))
    expected = np.empty((N, C)), as_float(dw), as_float(db)
    inputs = [as_float(a) for a in (dy, res, mean, rstd, w)]
    REFERENCE.residual_norm_backward(*expected, *inputs, as_float(past) if dres else None, acc)
    dx = {None: device.unwritten(N, C, dtype=device.real), "dres": past, "dy": dy}[into]
    parts = device.unwritten(2, norm.norm_parts(N), C)
    norm.norm_weight_partials(device, parts, dy, res, mean, rstd)
    norm.sum_partials(device, (dw, db), parts, acc)
    norm.norm_backward(device, dx, dy, res, mean, rstd, w, past)
    names = ("dx", "dw", "db")
    outputs = zip(names, (dx, dw, db), expected, bounds("residual_norm_backward", *names), strict=True)
    return [Result(*output) for output in outputs]


def check_bias(device, rng, N, O, acc=False):  # noqa: E741
    """A bias added, and the gradient of one."""
    y, b = device.reals(rng.standard_normal((N, O))), device.floats(rng.standard_normal(O))
    db = device.floats(rng.standard_normal(O)) if acc else device.unwritten(O)
    expected_db = as_float(y).sum(axis=0) + (as_float(db) if acc else 0.0)
    parts = device.unwritten(1, norm.column_parts(N), O)
    norm.column_partials(device, parts, y)
    norm.sum_partials(device, (db,), parts, acc)
    expected_y = as_float(y) + as_float(b)
    elementwise.add_bias(device, y, b)
    (bound,) = bounds("linear_backward", "db")
    return [Result("y", y, expected_y, 1e-7), Result("db", db, expected_db, bound)]


def check_gelu(device, rng, N, O):  # noqa: E741
    pre, b = device.reals(rng.standard_normal((N, O)) * 3), device.floats(rng.standard_normal(O))
    act, again = (device.unwritten(N, O, dtype=device.real) for _ in range(2))
    dpre = device.reals(rng.standard_normal((N, O)))
    before = as_float(dpre)
    expected_pre = as_float(pre) + as_float(b)
    elementwise.bias_gelu_forward(device, act, pre, b)
    elementwise.gelu_forward(device, again, pre)
    elementwise.gelu_backward(device, dpre, pre)
    assert act.tobytes() == again.tobytes()
    stored = as_float(pre)
    (bound,) = bounds("gelu_forward", "act")
    return [
        Result("pre", pre, expected_pre, 1e-7),
        Result("act", act, gelu(stored), bound),
        Result("dpre", dpre, before * gelu_derivative(stored), *bounds("gelu_linear_backward", "dpre")),
    ]


def check_round_weights(device, rng, sizes):
    sources = [device.floats(rng.standard_normal(size) * 10.0 ** rng.integers(-42, 38, size)) for size in sizes]
    special = np.array(
        [
            *(0x3F808000, 0x3F818000),  # ties, down and up to the even number
            *(0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000001),  # the largest, infinities, the least
            *(0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000),  # NaNs; a carry would make numbers of some
        ],
        np.uint32,
    )
    for array in sources:
        array[: special.size] = special.view(np.float32)[: array.size]
    targets = [device.unwritten(size, dtype=np.uint16) for size in sizes]
    rows = [(a.ctypes.data, b.ctypes.data, a.size) for a, b in zip(sources, targets, strict=True)]
    elementwise.round_weights(device, device.put(rows, np.int64))
    for array, target in zip(sources, targets, strict=True):
        expected = np.empty(array.shape, np.uint16)
        bfloat16.from_float32(array, expected)
        both_nan = np.isnan(as_float(target)) & np.isnan(as_float(expected))
        assert ((target == expected) | both_nan).all()
    return []


def check_softmax_loss(device, rng, N, V, Vp, gradient=True, in_place=False):
    logits = device.floats(rng.standard_normal((N, Vp)) * 3)
    targets = device.ints(rng.integers(0, V, N))
    if N > 1:
        targets[::4] = -1
    counted, exact, dloss = targets >= 0, as_float(logits)[:, :V], 1.0 / N
    logits[:, V:] = np.nan  # padding counts for nothing
    logits[~counted] = np.nan
    losses = device.unwritten(N)
    dlogits = logits if in_place else device.unwritten(N, Vp, dtype=device.real)
    classifier.softmax_loss(device, dlogits, losses, logits, targets, V, dloss, gradient)
    exact = exact - exact.max(axis=1, keepdims=True)
    log_probabilities = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    rows = np.arange(N)
    losses_bound, bound = bounds("head_loss", "losses", "dx")
    results = [Result("losses", losses, np.where(counted, -log_probabilities[rows, targets], 0.0), losses_bound)]
    if not gradient:
        assert in_place or np.isnan(as_float(dlogits)).all()
        return results
    expected = np.zeros((N, Vp))
    expected[:, :V] = np.exp(log_probabilities)
    expected[rows, targets] -= 1.0
    expected *= dloss * counted[:, None]
    assert not as_float(dlogits)[:, V:].any()
    return [*results, Result("dlogits", dlogits, expected, bound)]


def check_sum_squares(device, rng, P):
    g = device.floats(rng.standard_normal(P))
    out = device.unwritten(1, dtype=np.float64)
    optimizer.sum_squares(device, out, device.unwritten(optimizer.SQUARE_PARTS, dtype=np.float64), g)
    return [Result("out", out, np.dot(as_float(g), as_float(g))[None], *bounds("sum_squares", "out"))]


def check_adamw(device, rng, P, max_norm=0.3, cuts=None):
    """``cuts``: where segments end; then every fifth is left out, a gap."""
    ends = [*(cuts or sorted({P // 3, P // 2} - {0, P})), P]
    rows = [(a, b - a, k % 2) for k, (a, b) in enumerate(itertools.pairwise([0, *ends])) if cuts is None or k % 5 != 3]
    segments = np.array(rows, np.int64)
    master, g = (device.floats(rng.standard_normal(P)) for _ in range(2))
    m, v = device.floats(rng.standard_normal(P) * 0.1), device.floats(np.square(rng.standard_normal(P)))
    hyper = np.array([1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3, max_norm])
    sumsq = np.array([np.dot(as_float(g), as_float(g))])
    old = [as_float(a) for a in (master, m, v)]
    expected = [a.copy() for a in old]
    REFERENCE.adamw(*expected, as_float(g), segments, hyper, sumsq)
    covered = np.zeros(P, bool)
    for offset, length, _ in segments:
        covered[offset : offset + length] = True
    table, doubles = device.put(segments, np.int64), [device.put(a, np.float64) for a in (hyper, sumsq)]
    optimizer.adamw(device, master, m, v, g, table, *doubles)
    outputs = zip(("master", "m", "v"), (master, m, v), expected, old, strict=True)
    return [
        Result(name, found, np.where(covered, wanted, before), *bounds("adamw", name))
        for name, found, wanted, before in outputs
    ]


def columns(sizes):
    return [{"N": row["N"], "O": row["O"]} for row in sizes]


def rows_of(letters, *rows):
    return [dict(zip(letters.split(), row, strict=True)) for row in rows]


# the ragged sizes of the cases that all backends run, then such as take vectors, several turns or several pieces
NORMS = [*NORM, *rows_of("N C", (300, 64), (9, 768), (3, 2056), (9001, 8))]
LINEARS = [*columns(LINEAR), *rows_of("N O", (300, 64), (9, 768), (5, 3072), (2, 2304))]
HEADS = [{k: row[k] for k in ("N", "V", "Vp")} for row in HEAD] + rows_of(
    "N V Vp", (3, 4999, 5003), (3, 5000, 5056), (2, 50257, 50304)
)
EMBEDDINGS = [*EMBEDDING, *rows_of("V T N C", (40, 30, 300, 64), (9, 6, 20, 768), (4, 3, 2100, 8), (3, 3, 5, 2304))]
MANY = [*range(1, 40), *range(60, 3000, 7), 5000]  # segments of 1, of 7 and of thousands of elements

CASES = [
    *((check_embedding_forward, sizes) for sizes in EMBEDDINGS),
    *((check_embedding_backward, {**sizes, "acc": acc}) for sizes in EMBEDDINGS for acc in (False, True)),
    *((check_norm_forward, sizes) for sizes in NORMS),
    *((check_norm_forward, {**NORMS[k], "in_place": True}) for k in (2, 5)),
    *((check_norm_forward, {**NORMS[k], "bias": False}) for k in (1, 5)),
    *((check_norm_forward, {**NORMS[k], "delta": False, "bias": False}) for k in (1, 5)),
    *((check_norm_backward, sizes) for sizes in NORMS),
    *((check_norm_backward, {**NORMS[k], "into": into}) for k in (1, 5) for into in ("dres", "dy")),
    *((check_norm_backward, {**NORMS[k], "acc": True, "dres": False}) for k in (1, 5)),
    *((check_bias, {**sizes, "acc": acc}) for sizes in LINEARS for acc in (False, True)),
    *((check_gelu, sizes) for sizes in LINEARS),
    (check_round_weights, {"sizes": (1, 1000, 8, 4099)}),
    *((check_softmax_loss, sizes) for sizes in HEADS),
    *((check_softmax_loss, {**HEADS[k], "gradient": False}) for k in (1, 4)),
    *((check_sum_squares, sizes) for sizes in FLAT),
    *((check_adamw, {**FLAT[k], "max_norm": max_norm}) for k in (0, 1, 2) for max_norm in (0.0, 0.3, 1e9)),
    (check_adamw, FLAT[3]),
    (check_adamw, {"P": 9000, "cuts": MANY}),
]
IN_PLACE = [(check_softmax_loss, {**HEADS[k], "in_place": True}) for k in (1, 3, 4)]


def label(case):
    check, sizes = case
    return check.__name__.removeprefix("check_") + "-" + " ".join(f"{k}={v}" for k, v in sizes.items() if k != "cuts")


@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_against_reference(case, bf16):
    check, sizes = case
    with EmulatedDevice(bf16) as device:
        run(check, device, sizes)


@pytest.mark.parametrize("case", IN_PLACE, ids=label)
def test_gradient_in_place_of_logits(case):
    check, sizes = case
    with EmulatedDevice(bf16=False) as device:
        run(check, device, sizes)


UNALIGNED = [
    (check_embedding_forward, EMBEDDINGS[3]), (check_embedding_backward, {**EMBEDDINGS[3], "acc": True}),
    (check_norm_forward, NORMS[2]), (check_norm_backward, NORMS[2]), (check_bias, LINEARS[5]), (check_gelu, LINEARS[5]),
    (check_round_weights, {"sizes": (1000,)}), (check_softmax_loss, HEADS[1]), (check_sum_squares, FLAT[1]),
    (check_adamw, FLAT[1]),
]  # fmt: skip


@pytest.mark.parametrize("case", UNALIGNED, ids=label)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_where_vectors_would_fit_but_for_the_address(case, bf16):
    check, sizes = case
    with EmulatedDevice(bf16, shift=1) as device:
        run(check, device, sizes)


def test_gelu_over_its_whole_range():
    """Every exponent of both signs, a few units in the last place."""
    x = np.concatenate([np.logspace(-30, 30, 4001), np.linspace(-12.0, 12.0, 20_001)])
    with EmulatedDevice(bf16=False) as device:
        pre = device.floats(np.concatenate([x, -x]))
        act, dpre = device.unwritten(pre.size), device.floats(np.ones(pre.size))
        elementwise.gelu_forward(device, act, pre)
        elementwise.gelu_backward(device, dpre, pre)
        exact = as_float(pre)
        # where |gelu| < 1e-6 for large negative x only the absolute error matters
        allowed = 5e-7 * np.abs(gelu(exact)) + 1e-7 * np.minimum(1.0, np.abs(exact))
        assert (np.abs(act - gelu(exact)) <= allowed).all()
        assert np.abs(dpre - gelu_derivative(exact)).max() <= 1e-6


def test_large_logits():
    """Logits of ±1e4 neither overflow nor lose the loss."""
    with EmulatedDevice(bf16=False) as device:
        logits = device.floats([[1e4, 0.0, -1e4, 7.0], [-1e4, 0.0, 1e4, 7.0], [1e4, 0.0, -1e4, 7.0]])
        losses, targets = device.unwritten(3), device.ints([0, 2, 1])
        classifier.softmax_loss(device, None, losses, logits, targets, 3, 1.0, False)
        assert losses.tolist() == [0.0, 0.0, 1e4]


def test_pieces_depend_on_the_shape_alone():
    assert [norm.column_parts(N) for N in (1, 32, 33, 4096, 8192, 8193, 65536, 10**6)] == [
        1, 1, 2, 128, 256, 249, 256, 256
    ]  # fmt: skip


def test_threads_of_a_row():
    assert [row_threads(columns, 8) for columns in (1, 256, 257, 768, 1600, 3072)] == [32, 32, 64, 96, 224, 192]
    assert row_threads(50304, 4, 1024) == 992  # 13 turns; with 1,024 the last would be for a quarter of the threads


class Fault(NamedTuple):
    """Something a kernel might do wrong: ``old`` text, which is there once, replaced; and a case that shows it."""

    name: str
    file: str
    old: str
    new: str
    case: tuple
    bf16: bool = False
    shift: int = 0


FAULTS = [
    Fault("no barrier before partial sums are read", "norm",
          "    __syncthreads();\n    value = warp_sum(lane", "    value = warp_sum(lane",
          (check_norm_forward, NORMS[5])),
    Fault("no barrier before partial sums are used again", "norm",
          "parts[lane] : (T)0);\n    __syncthreads();", "parts[lane] : (T)0);", (check_norm_forward, NORMS[5])),
    Fault("a warp's sum over half of it", "norm",
          "T warp_sum(T value) {\n#pragma unroll\n    for (int distance = LANES / 2;",
          "T warp_sum(T value) {\n#pragma unroll\n    for (int distance = LANES / 4;", (check_norm_forward, NORMS[3])),
    Fault("alignment taken for granted", "norm",
          "& 15ull) == 0", "& 15ull) < 16", (check_norm_forward, NORMS[2]), shift=1),
    Fault("variance of a sample", "norm",
          "block_sum(squares, parts) / C", "block_sum(squares, parts) / (C - 1)", (check_norm_forward, NORMS[3])),
    Fault("mean of what is not yet rounded", "norm",
          "values[k] = as_stored(values[k] + more[k]);", "values[k] += more[k];", (check_norm_forward, NORMS[3]), True),
    Fault("a column too many", "norm",
          "column < WARP * W && start + column < C", "column < WARP * W && start + column <= C",
          (check_norm_backward, NORMS[1])),
    Fault("no barrier between the sums of two arrays", "norm",
          "        out[start + column] = total;\n    }\n    __syncthreads();",
          "        out[start + column] = total;\n    }", (check_norm_backward, NORMS[4])),
    Fault("rows of a piece that end where the next begins", "norm",
          "const int end = min(N, first + rows);\n    float* dw",
          "const int end = min(N, first + rows + 1);\n    float* dw",
          (check_norm_backward, NORMS[3])),
    Fault("the same bias for all columns of a thread's turn", "norm",
          "more[k] += bias[k];", "more[k] += bias[0];", (check_norm_forward, NORMS[4])),
    Fault("both sums in the first's place", "norm",
          "blockIdx.y == 0 ? first : second", "first", (check_norm_backward, NORMS[3])),
    Fault("gradient of a bias not added", "norm",
          "out[o] = acc ? out[o] + total : total;", "out[o] = total;", (check_bias, {**LINEARS[3], "acc": True})),
    Fault("an element past the end of a row", "embedding",
          "c < C; c += blockDim.x * W) {\n        float sum[W];",
          "c <= C; c += blockDim.x * W) {\n        float sum[W];",
          (check_embedding_forward, EMBEDDINGS[1])),
    Fault("equal ids added once more for each", "embedding",
          "if (__syncthreads_or(any)) {\n            return;", "if (__syncthreads_or(any)) {\n            break;",
          (check_embedding_backward, EMBEDDINGS[2])),
    Fault("places of matches within their warp only", "embedding",
          "= count + __popc(", "= __popc(", (check_embedding_backward, EMBEDDINGS[2])),
    Fault("no barrier before the list of matches is read", "embedding",
          "    __syncthreads();\n    return count;", "    return count;", (check_embedding_backward, EMBEDDINGS[2])),
    Fault("the last row left out", "elementwise",
          "if (first + row < N) {\n                Real* here",
          "if (first + row < N - 1) {\n                Real* here",
          (check_bias, LINEARS[2])),
    Fault("GELU of what is not yet rounded", "elementwise",
          "values[k] = as_stored(values[k] + bias[k]);", "values[k] += bias[k];", (check_gelu, LINEARS[3]), True),
    Fault("cut off, not rounded", "elementwise",
          "0x40u : rounded", "0x40u : bits >> 16", (check_round_weights, {"sizes": (100,)})),
    Fault("ties rounded up", "elementwise",
          "0x40u : rounded", "0x40u : (bits + 0x8000u) >> 16", (check_round_weights, {"sizes": (100,)})),
    Fault("NaN rounded like a number", "elementwise",
          "? (bits >> 16) | 0x40u : rounded", "? rounded : rounded", (check_round_weights, {"sizes": (100,)})),
    Fault("target -1 not ignored", "classifier",
          "if (target < 0) {", "if (target < -1) {", (check_softmax_loss, HEADS[1])),
    Fault("padding in the sum", "classifier",
          "if (c + k < V) {\n                total +=", "if (c + k < Vp) {\n                total +=",
          (check_softmax_loss, HEADS[2])),
    Fault("padding of the gradient left as it comes", "classifier",
          "c + k < V ? difference * dloss : 0.0f", "difference * dloss", (check_softmax_loss, HEADS[1])),
    Fault("rows as far apart as they are long", "classifier",
          "Real* drow = dlogits + n * Vp", "Real* drow = dlogits + n * V", (check_softmax_loss, HEADS[1])),
    Fault("the target's logit read after it is overwritten", "classifier",
          "(top - correct)", "(top - logits[target])", IN_PLACE[1]),
    Fault("squares in float", "optimizer",
          "sum += (double)values[k] * values[k];", "sum += values[k] * values[k];", (check_sum_squares, FLAT[1])),
    Fault("what lies between segments updated", "optimizer",
          "if (k < K && segments[3 * k] <= i) {", "if (k < K) {", (check_adamw, {"P": 9000, "cuts": MANY})),
    Fault("four elements with the decay of the first", "optimizer",
          "here[0] <= first && first + LANES <= here[0] + here[1]", "here[0] <= first && first + LANES <= P",
          (check_adamw, FLAT[1])),
    Fault("no barrier before the hyperparameters are read", "optimizer",
          "    }\n    __syncthreads();\n    const Step step", "    }\n    const Step step", (check_adamw, FLAT[1])),
    Fault("gradients not clipped", "optimizer",
          "clipped ? (float)(max_norm / sqrt(sumsq)) : 1.0f", "1.0f", (check_adamw, {**FLAT[1], "max_norm": 0.3})),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_faults_are_noticed(fault):
    assert source(fault.file).count(fault.old) == 1
    check, sizes = fault.case
    with EmulatedDevice(fault.bf16, fault.shift, lambda text: text.replace(fault.old, fault.new)) as device:
        device.program(fault.file)  # it compiles: what is noticed is what it does
        with pytest.raises((AssertionError, emulator.EmulatorError)):
            run(check, device, sizes)
