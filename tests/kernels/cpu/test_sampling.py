"""The kernels of sampling in every form of the weights: against the float64 reference, rows together and alone, one
thread and two, with and without products of bytes."""

import json
import os
import platform
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from support.cpu_kernels import thread_limit
from support.paths import FIXTURES

from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats import bfloat16
from llmc_cli.kernels.backend import open_kernels, open_sampling
from llmc_cli.kernels.cases import Case, cases, run
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.reference.kernels import REFERENCE
from llmc_cli.models.files import load_model
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.sampling.generation import Decoder, generate
from llmc_cli.sampling.options import SamplingOptions
from llmc_cli.verification.comparison import compare

GOLDEN = json.loads((FIXTURES / "sampling_golden.json").read_text())
GREEDY = SamplingOptions(temperature=0)
CHANGED = ("embedding_forward", "residual_norm_forward", "linear_forward", "linear_gelu_forward", "head_logits",
           "head_loss")  # fmt: skip
CASES = [case for name in CHANGED for case in cases(name) if not (name == "head_loss" and case.args["dx"] is not None)]
LABELS = [f"{case.operation}-{case.label}" for case in CASES]
BYTES_BOUND = 5e-5  # of max|error| / max|reference|: x is rounded to 32,512 steps to either side


@pytest.fixture(scope="module")
def opened():
    """Kernels by name: the three forms, and int8 as on a processor without products of bytes."""
    made = {form: open_sampling("cpu", form, 2).kernels for form in ("fp32", "bf16", "int8")}
    from llmc_cli.kernels.cpu import compiling, few_rows
    from llmc_cli.kernels.cpu.sampling import SamplingKernels

    plain = compiling.kernel(
        compiling.float2, compiling.float2, compiling.float2, compiling.ubytes2, *few_rows.COMMON,
        fastmath=compiling.CONTRACT,
    )(few_rows.float_rows)  # fmt: skip
    compiling.compile_registered(None)
    return {**made, "int8 plain": SamplingKernels(2, "int8", byte_products=False, int8_rows=plain)}


NAMES = ("fp32", "bf16", "int8", "int8 plain")


def kept(kernels, master):
    """The float64 values that a weight is kept as, computed here by other means than the kernels'."""
    master = np.asarray(master, np.float32)
    if kernels.precision == "bf16":
        bits, wide = np.empty(master.shape, np.uint16), np.empty(master.shape, np.float32)
        bfloat16.from_float32(master, bits)
        bfloat16.to_float32(bits, wide)
        return wide.astype(np.float64)
    if kernels.precision == "int8":
        largest = np.abs(master).max(axis=1, keepdims=True)
        scale = (largest / np.float32(127)).astype(np.float64)
        steps = np.rint((master * (np.float32(127) / np.where(largest > 0, largest, 1))).astype(np.float64))
        assert np.abs(steps).max() <= 127
        return steps * scale
    return master.astype(np.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES, ids=LABELS)
def test_against_reference(opened, name, case):
    """The reference gets the weights as they are kept, so that only arithmetic makes a difference."""
    kernels, args = opened[name], case.args
    if args.get("w") is not None and args["w"].ndim == 2:
        args = {**args, "w": kept(kernels, args["w"])}
    found, expected = run(kernels, case), run(REFERENCE, Case(case.operation, case.label, args))
    for output, values in found.items():
        bound = OPERATIONS[case.operation].bounds[output]
        if name == "int8" and kernels.byte_products and case.operation != "head_loss":
            bound = max(bound, BYTES_BOUND)
        check = compare(case.operation, output, values, expected[output], bound)
        assert check.ok, check


def product(kernels, x, master, b):
    """act and pre of ``linear_gelu_forward``, pre of ``linear_forward`` and the logits of ``head_logits``."""
    N, O = len(x), len(master)  # noqa: E741
    weight = kernels.bind(master)
    kernels.publish([weight])
    outputs = [np.full((N, O), np.nan, np.float32) for _ in range(4)]
    kernels.linear_gelu_forward(outputs[0], outputs[1], x, weight, b)
    kernels.linear_forward(outputs[2], x, weight, b)
    kernels.head_logits(outputs[3], x, weight)
    assert not np.isnan(outputs).any()
    assert np.array_equal(outputs[1], outputs[2])
    return outputs


def normal(kernels, *shape):
    array = kernels.alloc(shape, np.float32)
    array[...] = np.random.default_rng([*shape]).standard_normal(shape, np.float32)
    return array


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("O", "K"), [(1, 64), (3, 128), (16, 64), (50, 192), (133, 64), (40, 100), (7, 1)])
def test_rows_together_equal_rows_alone_with_one_thread_and_two(opened, name, O, K):  # noqa: E741
    kernels = opened[name]
    x, master, b = normal(kernels, 8, K), normal(kernels, O, K), normal(kernels, O)
    alone = [product(kernels, x[i : i + 1], master, b) for i in range(8)]
    for N in range(1, 9):
        with thread_limit(kernels, 1 + N % 2):
            together = product(kernels, x[:N], master, b)
        for output, one in zip(together, zip(*alone[:N], strict=True), strict=True):
            error = np.abs(output - np.concatenate(one)).max()
            assert error == 0 if name != "fp32" or K % 64 == 0 else error < 1e-4  # BLAS, whose sums depend on N


@pytest.mark.parametrize("name", NAMES)
def test_many_rows_equal_few(opened, name):
    """A prompt goes through BLAS, with the same weights."""
    kernels = opened[name]
    x, master, b = normal(kernels, 40, 128), normal(kernels, 90, 128), normal(kernels, 90)
    many = product(kernels, x, master, b)
    few = [product(kernels, x[i : i + 8], master, b) for i in range(0, 40, 8)]
    bound = BYTES_BOUND if name == "int8" else 2e-6
    for output, parts in zip(many, zip(*few, strict=True), strict=True):
        assert np.abs(output - np.concatenate(parts)).max() <= bound * np.abs(output).max()


def test_a_wide_matrix_is_widened_in_blocks(opened, monkeypatch):
    from llmc_cli.kernels.cpu import sampling

    x, master, b = (normal(opened["bf16"], *shape) for shape in ((20, 64), (100, 64), (100,)))
    whole = product(opened["bf16"], x, master, b)
    monkeypatch.setattr(sampling, "DEQUANTIZED_NUMBERS", 64 * 33)
    for output, expected in zip(product(opened["bf16"], x, master, b), whole, strict=True):
        assert np.allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_as_the_files_have_it(opened):
    """Rounded to the nearest, ties to even; infinities stay, and NaN whose low bits alone say so."""
    from llmc_cli.kernels.cpu import quantization

    kernels = opened["bf16"]
    bits = np.random.default_rng(0).integers(0, 1 << 32, (9, 64), dtype=np.uint32)
    bits[0, :6] = 0x3F808000, 0x3F818000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF
    master = bits.view(np.float32)
    weight = kernels.bind(master)
    kernels.publish([weight])
    expected = np.empty(master.shape, np.uint16)
    bfloat16.from_float32(master, expected)
    numbers = ~np.isnan(master)
    found = np.empty(master.shape, np.uint32)
    quantization.expand_bfloat16(found, weight.rows)
    assert np.array_equal(found[numbers] >> 16, expected[numbers])
    assert np.isnan(found.view(np.float32)[~numbers]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "w"])
@pytest.mark.parametrize("N", [1, 5, 30])
def test_what_is_not_finite_stays_so(opened, name, bad, where, N):
    kernels = opened[name]
    x, master, b = normal(kernels, N, 64), normal(kernels, 20, 64), normal(kernels, 20)
    (x if where == "x" else master)[0, 5] = bad
    weight = kernels.bind(master)
    kernels.publish([weight])
    y = kernels.alloc((N, 20), np.float32)
    with np.errstate(invalid="ignore"):
        kernels.linear_forward(y, x, weight, b)
    spoiled = y[0] if where == "x" else y[:, 0]
    assert not np.isfinite(spoiled).any()
    assert np.isfinite(y[1:] if where == "x" else y[:, 1:]).all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros(opened, name):
    kernels = opened[name]
    x, master, b = kernels.alloc((3, 64), np.float32), kernels.alloc((5, 64), np.float32), normal(kernels, 5)
    assert np.array_equal(product(kernels, x, normal(kernels, 5, 64), b)[2], np.tile(b, (3, 1)))
    assert np.array_equal(product(kernels, normal(kernels, 3, 64), master, b)[2], np.tile(b, (3, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_allocates_nothing(opened, name):
    from numba.core.runtime import _nrt_python, rtsys

    _nrt_python.memsys_enable_stats()
    kernels = opened[name]
    for N, K in ((1, 256), (4, 256), (4, 100), (30, 256)):
        x, b, y = normal(kernels, N, K), normal(kernels, 5000), kernels.alloc((N, 5000), np.float32)
        weight = kernels.bind(normal(kernels, 5000, K))
        kernels.publish([weight])
        kernels.linear_gelu_forward(y, y.copy(), x, weight, b)
        act = y.copy()
        before = rtsys.get_allocation_stats()
        tracemalloc.start()
        kernels.linear_gelu_forward(act, y, x, weight, b)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        after = rtsys.get_allocation_stats()
        assert after.alloc - after.free == before.alloc - before.free
        assert after.alloc - before.alloc <= 40  # headers of array arguments
        assert peak < 8192


def logits_of(model, ids, prompt, S=1):
    """Logits behind the first ``prompt`` ids, and then behind one more each time, of the last of S equal sequences."""
    decoder = Decoder(model, KVCache(model.config, model.kernels, 1, len(ids), prompt))
    found = [decoder.prefill(ids[:prompt])[-1].copy()]
    if S > 1:
        decoder = Decoder(model, KVCache(model.config, model.kernels, S, len(ids), S))
        for token in ids[:prompt]:
            decoder.step([token] * S)
    return np.stack(found + [decoder.step([token] * S)[-1].copy() for token in ids[prompt:]])


@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_decoding_agree_and_so_do_batches(opened, name):
    model = load_model(FIXTURES / "sampling_model.bin", opened[name])
    ids = np.random.default_rng(3).integers(0, 120, 40).tolist()
    by_token, mixed, batched = logits_of(model, ids, 1), logits_of(model, ids, 30), logits_of(model, ids, 1, 8)
    assert np.abs(by_token[29:] - mixed).max() < (2e-3 if name == "int8" else 2e-4)
    error = np.abs(by_token[1:] - batched[1:]).max()
    assert error < 1e-4 if name == "fp32" else error == 0  # this model's rows are too short for fp32: BLAS


def test_bytes_and_floats_agree(opened):
    ids = np.random.default_rng(4).integers(0, 120, 40).tolist()
    bytewise, plain = (
        logits_of(load_model(FIXTURES / "sampling_model.bin", opened[name]), ids, 1) for name in ("int8", "int8 plain")
    )
    assert np.abs(bytewise - plain).max() < 2e-3


def test_greedy_equals_transformers(opened):
    model = load_model(FIXTURES / "sampling_model.bin", opened["fp32"])
    for case in GOLDEN:
        assert [token for piece in generate(model, case["prompt"], GREEDY, 64) for token in piece.ids] == case["ids"]


def test_sees_bad_weights(opened):
    for name in NAMES:
        model = load_model(FIXTURES / "sampling_model.bin", opened[name])
        model.params["wte"][3, 3] = np.inf
        model.publish()
        with pytest.raises(DataError, match="llmc verify"):
            list(generate(model, [1], GREEDY))


def test_what_sampling_is_opened_with(no_cupy):
    backend = open_sampling("auto", "auto", 1)
    assert (backend.precision, backend.threads, backend.kernels.precision) == ("fp32", 1, "fp32")
    assert "fp32: the default" in backend.reason
    assert "int8 weights" in open_sampling("cpu", "int8", 1).description
    with pytest.raises(UsageError, match="--precision int8: for llmc sample and"):
        open_kernels("cpu", "int8", 1)
    with pytest.raises(UsageError, match="--precision bf16x3: expected one of auto, fp32, bf16, int8"):
        open_sampling("cpu", "bf16x3", 1)
    with pytest.raises(MissingError, match="CuPy is not installed"):
        open_sampling("cuda", "int8", 1)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "features"),
    [("x86-64", "+sse2"), ("haswell", "+avx,+avx2,+fma"), ("alderlake", "+avx,+avx2,+fma,+avxvnni")],
)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
def test_with_narrower_vectors(tmp_path, name, features):
    """This whole file as on other processors, compiled anew."""
    if "avxvnni" in features and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-VNNI")
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "LLMC_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not narrower"]
    subprocess.run(command, check=True, env=os.environ | settings, stdout=subprocess.DEVNULL)
