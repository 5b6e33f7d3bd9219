"""Attention kernels on the emulator: accuracy against float64, the same bits in any order of blocks and
threads, and detection of planted faults."""

import functools
import itertools
import re
from typing import NamedTuple

import numpy as np
import pytest
from support.cuda_checks import SCHEDULES, EmulatedDevice, as_float
from support.cuda_emulator import emulator
from support.cuda_emulator.emulator import EmulatorError

from llmc_cli.kernels.cuda import attention
from llmc_cli.kernels.cuda.source import source
from llmc_cli.kernels.operations import CACHED_SIZES, OPERATIONS
from llmc_cli.kernels.reference.kernels import REFERENCE

pytestmark = pytest.mark.usefixtures("requires_gxx")

# B, T, NH, HS; mostly two heads or more, since a single head would not reveal rows of the wrong head
MMA = [(1, T, 2, HS) for T, HS in itertools.product((1, 17, 64, 65, 129, 150, 257), (64, 128))] + [(2, 33, 3, 64)]
TILES = [
    *((2, 1, 2, 8), (1, 2, 2, 8), (2, 31, 3, 1), (1, 33, 2, 16), (1, 70, 2, 80), (2, 100, 1, 64), (1, 129, 2, 8)),
    (1, 66, 1, 256),
]
LONGER = ({"S": 2, "T": 1, "NH": 2, "HS": 64, "Tmax": 301}, {"S": 2, "T": 1, "NH": 1, "HS": 256, "Tmax": 90})
"""Cached sizes in addition to those of all backends: several iterations of all warps, and the largest head."""

BF16 = 1e-2
"""Bound on the relative RMS error of bf16 outputs computed from bf16 probabilities. One rounding gives 1.7e-3; dq and
dk, which are smaller, also depend on the rounded out."""


class AttentionDevice(EmulatedDevice):
    """Records the kernels launched. ``fault`` is planted in its kernel."""

    def __init__(self, bf16, tensor_cores=True, fault=None):
        super().__init__(bf16)
        self.tensor_cores, self.fault = tensor_cores, fault
        self.kernels = []

    def program(self, file, kernel):
        self.kernels.append(kernel)
        if self.fault and self.fault.kernel == kernel:
            return self.compiled(self.fault.planted())
        return super().program(file)


class Result(NamedTuple):
    name: str
    found: np.ndarray  # on the device
    expected: np.ndarray
    whole: np.ndarray  # what is expected, and more that the error may be compared with
    bound: float  # in float32, on the largest error to the largest number

    def run_case(self):
        """The error, if it is within the bound."""
        difference = as_float(self.found) - self.expected
        if self.found.dtype == np.uint16:
            error, bound = root_mean_square(difference) / root_mean_square(self.whole), BF16
        else:
            error, bound = np.abs(difference).max() / np.abs(self.whole).max(), self.bound
        assert error <= bound, f"{self.name}: error {error:.3g}, bound {bound:.3g}"
        return error


def root_mean_square(numbers):
    return np.sqrt(np.square(numbers).mean())


def check_training(device, B, T, NH, HS, shift=0, apart=False):
    """Check forward and backward. dqkv overwrites qkv, or is a separate array if ``apart``."""
    rng, C = np.random.default_rng(T * 1000 + HS), NH * HS
    qkv = device.put(rng.standard_normal((B, T, 3 * C)) * 1.5, device.real, shift)
    dout = device.put(rng.standard_normal((B, T, C)), device.real)
    out, queries = (device.unwritten(B, T, C, dtype=device.real) for _ in range(2))
    dqkv = device.unwritten(B, T, 3 * C, dtype=device.real) if apart else qkv
    lse, scratch = device.unwritten(B, NH, T), device.unwritten(attention.backward_scratch(B, T, NH, HS))
    attention.attention_forward(device, out, lse, qkv, NH)
    inputs = as_float(dout), np.empty((B, T, C)), np.empty((B, NH, T)), as_float(qkv)
    attention.attention_backward(device, dqkv, dout, out, lse, qkv, NH, scratch, queries)
    expected = np.empty((B, T, 3 * C))
    REFERENCE.attention_forward(*inputs[1:], NH)
    REFERENCE.attention_backward(expected, *inputs, NH)
    bounds = OPERATIONS["attention_forward"].bounds | OPERATIONS["attention_backward"].bounds
    pairs = (("out", out, inputs[1]), ("lse", lse, inputs[2]))
    results = [Result(name, found, wanted, wanted, bounds[name]) for name, found, wanted in pairs]
    for number, name in enumerate(("dq", "dk", "dv")):
        part = slice(number * C, (number + 1) * C)
        results.append(Result(name, dqkv[..., part], expected[..., part], expected, bounds["dqkv"]))
    return results


def check_cached(device, S, T, NH, HS, Tmax):
    rng, C = np.random.default_rng(T * 1000 + HS), NH * HS
    qkv = device.put(rng.standard_normal((S, T, 3 * C)) * 1.5, device.real)
    lengths = np.linspace(0, Tmax - T, S).astype(np.int32)
    cache = np.full((2, S, NH, Tmax, HS), np.nan)  # what is not filled counts for nothing
    for s, length in enumerate(lengths):
        cache[:, s, :, :length] = rng.standard_normal((2, NH, length, HS))
    keys, values = (device.put(each, device.real) for each in cache)
    out = device.unwritten(S, T, C, dtype=device.real)
    expected = np.empty((S, T, C)), as_float(keys), as_float(values)
    attention.attention_cached(device, out, keys, values, qkv, device.put(lengths, np.int32), NH)
    REFERENCE.attention_cached(*expected, as_float(qkv), lengths, NH)
    for found, wanted in zip((keys, values), expected[1:], strict=True):
        assert np.array_equal(as_float(found), wanted, equal_nan=True)
    return [Result("out", out, expected[0], expected[0], OPERATIONS["attention_cached"].bounds["out"])]


def run(check, device, schedules=SCHEDULES, **sizes):
    """``check`` on a device that ``device`` makes, under all schedules: the kernels launched. AssertionError or
    EmulatorError where one is wrong."""
    emulator.counters()  # reset
    bits = set()
    for seed in schedules:
        emulator.schedule(seed)
        with device() as memory:
            results = check(memory, **sizes)
            for result in results:
                result.run_case()
            bits.add(b"".join(result.found.tobytes() for result in results))
    assert len(bits) == 1, "the result depends on the order of blocks and threads"
    assert emulator.counters()["ldmatrix_conflicts"] == 0
    return set(memory.kernels)


def with_reals(bf16, **options):
    return functools.partial(AttentionDevice, bf16, **options)


@pytest.mark.parametrize("B, T, NH, HS", MMA)
def test_tensor_core_kernels(B, T, NH, HS):
    kernels = run(check_training, with_reals(True), B=B, T=T, NH=NH, HS=HS)
    assert kernels == {f"attention_mma_{name}_{HS}" for name in ("forward", "delta", "keys", "queries")}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("B, T, NH, HS", TILES)
def test_kernels_for_any_head_size(B, T, NH, HS, bf16):
    kernels = run(check_training, with_reals(bf16, tensor_cores=False), B=B, T=T, NH=NH, HS=HS)
    assert not any("mma" in kernel for kernel in kernels)


@pytest.mark.parametrize("HS, shift", [(32, 0), (64, 2)])
def test_fallback_without_tensor_cores(HS, shift):
    """Unsupported head sizes and unaligned arrays use the general kernels."""
    kernels = run(check_training, with_reals(True), (None,), B=1, T=5, NH=1, HS=HS, shift=shift)
    assert not any("mma" in kernel for kernel in kernels)


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_gradients_in_a_separate_array(tensor_cores):
    run(check_training, with_reals(True, tensor_cores=tensor_cores), (None,), B=1, T=70, NH=2, HS=64, apart=True)


def test_head_size_above_maximum_is_an_error():
    with pytest.raises(ValueError, match="head size 257 is not supported; the maximum is 256"):
        run(check_training, with_reals(False), B=1, T=1, NH=1, HS=257)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [*CACHED_SIZES, *LONGER], ids=lambda sizes: "-".join(map(str, sizes.values())))
def test_attention_over_kv_cache(sizes, bf16):
    run(check_cached, with_reals(bf16), **sizes)


class Fault(NamedTuple):
    name: str
    kernel: str  # that has it, of those that share the text
    old: str
    new: str

    @property
    def file(self):
        if "mma" in self.kernel:
            return "attention_mma"
        return "cached_attention" if self.kernel.startswith(("cache_", "attention_cached")) else "attention"

    def planted(self):
        """The source with the fault, and without the other kernels, which would only have to be compiled."""
        text = source(self.file)
        assert text.count(self.old) == 1, f"{self.name}: {text.count(self.old)} times in {self.file}.cu"
        kernels = re.findall(r'^extern "C" __global__ (?:.*\n)*?}\n', text, re.MULTILINE)
        for kernel in kernels:
            if f" {self.kernel}(" not in kernel:
                text = text.replace(kernel, "")
        return text.replace(self.old, self.new)


MASKED = "row + m * 16 + g + 8 * (e >> 1)) {"
BARRIER = "        __syncthreads();  // tile j has arrived, and all threads have finished reading tile j - 1\n"
EPILOGUE = "    __syncthreads();  // the results are staged in the memory of the tiles\n"
FORWARD_LOOP = "2^(scale2 * x)\n\n    for (int j = 0; j < tiles; j++) {\n"
KEYS_LOOP = "clear(dv);\n    const float scale2 = scale * LOG2_E;\n\n    for (int j = 0; j < tiles; j++) {\n"
QUERIES_LOOP = "clear(dq);\n    const float scale2 = scale * LOG2_E;\n\n    for (int j = 0; j < tiles; j++) {\n"
SCALES = "    float scales[S::PATCHES][2];\n"
STAGE = "        const unsigned keys = ring + (j & 1) * S::STAGE;\n"
VALUES = "        const unsigned values = keys + S::TILE;\n        float "
WAIT = "        copy_async_wait();\n"
FREE = "        __syncthreads();  // all threads have finished reading the tiles\n"

MMA_FAULTS = [
    *(Fault(f"no wait for tiles, {kernel}", f"attention_mma_{kernel}_64", loop + WAIT, loop)
      for kernel, loop in (("forward", FORWARD_LOOP), ("keys", KEYS_LOOP), ("queries", QUERIES_LOOP))),
    *(Fault(f"no barrier for tiles, {kernel}", f"attention_mma_{kernel}_128", loop + WAIT + BARRIER, loop + WAIT)
      for kernel, loop in (("forward", FORWARD_LOOP), ("keys", KEYS_LOOP), ("queries", QUERIES_LOOP))),
    Fault("no barrier before results, forward", "attention_mma_forward_64", EPILOGUE + "    float factors",
          "    float factors"),
    Fault("no barrier before results, keys", "attention_mma_keys_64", EPILOGUE + SCALES + "    float ones",
          SCALES + "    float ones"),
    Fault("no barrier before results, queries", "attention_mma_queries_128", EPILOGUE + SCALES + "#", SCALES + "#"),
    Fault("q overwritten too early", "attention_mma_forward_128",
          "        __syncthreads();  // the ring overwrites q\n    }", "    }"),
    Fault("k overwritten too early", "attention_mma_keys_64",
          "        __syncthreads();  // the ring overwrites k and v\n", ""),
    Fault("dout overwritten too early", "attention_mma_queries_128",
          "        __syncthreads();  // the ring overwrites q and dout\n", ""),
    Fault("queries read before they arrive", "attention_mma_forward_128",
          "        __syncthreads();\n        load_resident<S>(resident, own, rows);",
          "        load_resident<S>(resident, own, rows);"),
    Fault("copy not committed", "attention_mma_keys_64", "    }\n    copy_async_commit();\n}", "    }\n}"),
    Fault("no warp barrier before results are stored", "attention_mma_forward_64", "    __syncwarp();\n", ""),
    Fault("future key not masked", "attention_mma_forward_64", "if (column > " + MASKED,
          "if (column > 1 + " + MASKED),
    Fault("own key masked", "attention_mma_forward_128", "if (column > " + MASKED, "if (column >= " + MASKED),
    Fault("own query masked", "attention_mma_keys_64", "(e & 1) < " + MASKED, "(e & 1) <= " + MASKED),
    Fault("future key not masked, queries", "attention_mma_queries_64", "(e & 1) > " + MASKED,
          "(e & 1) > 1 + " + MASKED),
    Fault("a warp exits before a barrier", "attention_mma_queries_64",
          f"continue;  // no query of this warp attends to the tile\n        }}\n{STAGE}{VALUES}p[",
          f"break;\n        }}\n{STAGE}{VALUES}p["),
    Fault("diagonal tile not masked", "attention_mma_forward_64", "if (key + S::STREAMED - 1 > row) {",
          "if (key > row) {"),
    Fault("diagonal tile skipped", "attention_mma_keys_64", "if (query + S::STREAMED - 1 < row)",
          "if (query < row)"),
    Fault("first tile skipped", "attention_mma_keys_128", "first / S::STREAMED;", "first / S::STREAMED + 1;"),
    Fault("wrong stage read", "attention_mma_forward_64", f"{STAGE}{VALUES}scores",
          f"        const unsigned keys = ring;\n{VALUES}scores"),
    Fault("statistics of the wrong stage", "attention_mma_keys_64",
          "memory + S::RING + (j & 1) * S::STAGE + 2", "memory + S::RING + 2"),
    Fault("q of the wrong head", "attention_mma_forward_64", "qkv + b * T * 3 * C + (size_t)h * S::HS;",
          "qkv + b * T * 3 * C;"),
    Fault("statistics of the wrong head", "attention_mma_keys_64", "2 * ((b * NH + h) * T + (t",
          "2 * (b * NH * T + (t"),
    Fault("rows past T read", "attention_mma_forward_64", "row < valid;", "true;"),
    Fault("rows past T stored", "attention_mma_forward_64", "store_rows<S>(target, C, T - row,",
          "store_rows<S>(target, C, S::WARP_ROWS,"),
    Fault("rows past T stored, keys", "attention_mma_keys_128", "store_rows<S>(target + C, 3 * C, T - row,",
          "store_rows<S>(target + C, 3 * C, S::WARP_ROWS,"),
    Fault("sums not rescaled to the new maximum", "attention_mma_forward_64", "total[m][half] * shrink + sum",
          "total[m][half] + sum"),
    Fault("maximum of a lane instead of the row", "attention_mma_forward_64",
          "maximum = warp_max<QUAD>(maximum);", ""),
    Fault("scale dropped, forward", "attention_mma_forward_64", "scale * LOG2_E;  //", "LOG2_E;  //"),
    Fault("scale dropped, dk", "attention_mma_keys_64", "dk, scales, stage", "dk, ones, stage"),
    Fault("delta dropped", "attention_mma_queries_64", "(ds[m][n][e] - deltas[m][e >> 1])", "ds[m][n][e]"),
    Fault("lse in the wrong base", "attention_mma_delta_64", "lse[at] * LOG2_E", "lse[at]"),
    Fault("delta at the wrong row", "attention_mma_delta_128", "(bt / T * NH + h) * T + bt % T", "row"),
    Fault("q copied from the wrong rows", "attention_mma_delta_64", "qkv + skipped + index", "qkv + index"),
    Fault("swizzle wrong on reading", "attention_mma_forward_64", "(lane >> 3) & 1);", "lane >> 4);"),
    Fault("no swizzle, bank conflicts", "attention_mma_forward_64", "((chunk ^ (row & 7)) << 4)",
          "(chunk << 4)"),
]  # fmt: skip

TILE_FAULTS = [
    Fault("tiles overwritten while being read", "attention_forward_256", FREE + "        load_tile(a, left",
          "        load_tile(a, left"),
    Fault("tiles read before they are filled", "attention_forward_256",
          "load_tile(b, right, column, HS);\n        __syncthreads();\n", "load_tile(b, right, column, HS);\n"),
    Fault("weights written while scores are read", "attention_backward_queries_256", FREE + "        if (slab == 0) {",
          "        if (slab == 0) {"),
    Fault("values read before they arrive", "attention_backward_keys_256",
          "slab * TILE, HS);\n        __syncthreads();\n", "slab * TILE, HS);\n"),
    Fault("future key not masked", "attention_forward_256", "SIDE * j <= last + y", "SIDE * j <= 1 + last + y"),
    Fault("own query masked", "attention_backward_keys_256", "SIDE * i <= t && t < T", "SIDE * i < t && t < T"),
    Fault("last tile of keys skipped", "attention_backward_queries_256", "key <= first;", "key < first;"),
    Fault("lse past T read", "attention_backward_keys_256", "t < T ? lse[t] : 0.0f", "lse[t]"),
    Fault("rows past T read", "attention_forward_256", "r < rows.valid && column", "column"),
    Fault("rows past T stored", "attention_forward_256", "row < valid && column < HS", "column < HS"),
    Fault("columns of the next head stored", "attention_backward_queries_256", "row < valid && column < HS",
          "row < valid"),
    Fault("sums not rescaled to the new maximum", "attention_forward_256", "sums[slab][i][j] *= shrink;", ";"),
    Fault("row sum not reduced", "attention_forward_256", "warp_sum<SIDE>(sum)", "sum"),
    Fault("scale dropped, dq", "attention_backward_queries_256", "dq, scales, HS", "dq, row_lse, HS"),
    Fault("delta at the wrong row", "attention_delta", "(bt / T * NH + h) * T + bt % T", "row"),
    Fault("q of wrong rows copied", "attention_delta", "qkv + row * HS + row / NH * 2 * NH * HS", "qkv + row * HS"),
]  # fmt: skip

CACHED_FAULTS = [
    Fault("cached positions ignored", "attention_prompt_64", "length + first, HS, scale", "first, HS, scale"),
    Fault("new positions overwrite old ones", "cache_append", "lengths[s] + row % T", "row % T"),
    Fault("keys of the wrong sequence", "attention_cached_64", "keys += (s * NH + h)", "keys += h"),
    Fault("new key ignored", "attention_cached_64", "lengths[s] + 1;", "lengths[s];"),
    Fault("keys past the end not masked", "attention_cached_64", "first + n < count ? score", "true ? score"),
    Fault("keys past the end read", "attention_cached_64", "keys + (size_t)min(first + n, count - 1) * HS",
          "keys + (size_t)(first + n) * HS"),
    Fault("no barrier before warps are combined", "attention_cached_64",
          "    __syncthreads();\n    if (threadIdx.x < HS)", "    if (threadIdx.x < HS)"),
    Fault("warps combined without weights", "attention_cached_64", "weight * sums", "sums"),
]  # fmt: skip


def caught(fault):
    """Return the error that the fault causes, or None."""
    device = with_reals("mma" in fault.kernel, fault=fault)
    try:
        if fault in MMA_FAULTS:
            HS = int(fault.kernel.rpartition("_")[2])
            kernels = run(check_training, device, (1, 2), B=1, T=150, NH=2, HS=HS)
        elif fault in TILE_FAULTS:
            kernels = run(check_training, device, (1, 2), B=1, T=100, NH=2, HS=80)
        else:
            T = 5 if "prompt" in fault.kernel else 1
            kernels = run(check_cached, device, (1, 2), S=2, T=T, NH=2, HS=16, Tmax=150 + T)
    except (AssertionError, EmulatorError) as error:
        return str(error) or "banks conflict"
    assert fault.kernel in kernels
    return None


@pytest.mark.parametrize("fault", [*MMA_FAULTS, *TILE_FAULTS, *CACHED_FAULTS], ids=lambda fault: fault.name)
def test_planted_fault_is_detected(fault):
    options = ("-DREAL_BF16",) if "mma" in fault.kernel else ()
    emulator.Program(fault.planted(), options, check=True)  # a table out of date, or no C++, is no catch
    assert caught(fault) is not None
