"""The sampling kernels in every precision: against the float64 reference, for rows in batches and alone, with one
thread and two, with and without byte products."""

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
BYTES_BOUND = 5e-5  # on max|error| / max|reference|: x is rounded to 32,512 steps to either side of zero


@pytest.fixture(scope="module")
def kernels_by_name():
    """Kernels of each precision, and int8 as on a processor without byte products."""
    opened = {precision: open_sampling("cpu", precision, 2).kernels for precision in ("fp32", "bf16", "int8")}
    from llmc_cli.kernels.cpu import compiling, few_rows
    from llmc_cli.kernels.cpu.sampling import SamplingKernels

    plain = compiling.kernel(
        compiling.float2, compiling.float2, compiling.float2, compiling.ubytes2, *few_rows.COMMON,
        fastmath=compiling.CONTRACT,
    )(few_rows.float_rows)  # fmt: skip
    compiling.compile_registered(None)
    return {**opened, "int8 plain": SamplingKernels(2, "int8", byte_products=False, int8_rows=plain)}


NAMES = ("fp32", "bf16", "int8", "int8 plain")


def stored_values(kernels, master):
    """Return the float64 values of a weight after quantization, without using the kernels."""
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
def test_against_reference(kernels_by_name, name, case):
    """The reference gets the quantized weights, so that only the arithmetic differs."""
    kernels, args = kernels_by_name[name], case.args
    if args.get("w") is not None and args["w"].ndim == 2:
        args = {**args, "w": stored_values(kernels, args["w"])}
    found, expected = run(kernels, case), run(REFERENCE, Case(case.operation, case.label, args))
    for output, values in found.items():
        bound = OPERATIONS[case.operation].bounds[output]
        if name == "int8" and kernels.byte_products and case.operation != "head_loss":
            bound = max(bound, BYTES_BOUND)
        check = compare(case.operation, output, values, expected[output], bound)
        assert check.ok, check


def product(kernels, x, master, b):
    """Return act and pre of ``linear_gelu_forward``, y of ``linear_forward`` and the logits of ``head_logits``."""
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
def test_batched_rows_equal_single_rows_for_any_threads(kernels_by_name, name, O, K):  # noqa: E741
    kernels = kernels_by_name[name]
    x, master, b = normal(kernels, 8, K), normal(kernels, O, K), normal(kernels, O)
    alone = [product(kernels, x[i : i + 1], master, b) for i in range(8)]
    for N in range(1, 9):
        with thread_limit(kernels, 1 + N % 2):
            batched = product(kernels, x[:N], master, b)
        for output, one in zip(batched, zip(*alone[:N], strict=True), strict=True):
            error = np.abs(output - np.concatenate(one)).max()
            assert error == 0 if name != "fp32" or K % 64 == 0 else error < 1e-4  # else BLAS, whose sums depend on N


@pytest.mark.parametrize("name", NAMES)
def test_many_rows_agree_with_few(kernels_by_name, name):
    """Many rows, as in a prompt, are multiplied by BLAS."""
    kernels = kernels_by_name[name]
    x, master, b = normal(kernels, 40, 128), normal(kernels, 90, 128), normal(kernels, 90)
    many = product(kernels, x, master, b)
    few = [product(kernels, x[i : i + 8], master, b) for i in range(0, 40, 8)]
    bound = BYTES_BOUND if name == "int8" else 2e-6
    for output, parts in zip(many, zip(*few, strict=True), strict=True):
        assert np.abs(output - np.concatenate(parts)).max() <= bound * np.abs(output).max()


def test_large_matrix_is_dequantized_in_blocks(kernels_by_name, monkeypatch):
    from llmc_cli.kernels.cpu import sampling

    x, master, b = (normal(kernels_by_name["bf16"], *shape) for shape in ((20, 64), (100, 64), (100,)))
    whole = product(kernels_by_name["bf16"], x, master, b)
    monkeypatch.setattr(sampling, "DEQUANTIZED_NUMBERS", 64 * 33)
    for output, expected in zip(product(kernels_by_name["bf16"], x, master, b), whole, strict=True):
        assert np.allclose(output, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_rounds_as_file_formats_do(kernels_by_name):
    """Ties go to even; infinities and NaNs are preserved, also a NaN that only the dropped bits show."""
    from llmc_cli.kernels.cpu import quantization

    kernels = kernels_by_name["bf16"]
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
def test_non_finite_values_propagate(kernels_by_name, name, bad, where, N):
    kernels = kernels_by_name[name]
    x, master, b = normal(kernels, N, 64), normal(kernels, 20, 64), normal(kernels, 20)
    (x if where == "x" else master)[0, 5] = bad
    weight = kernels.bind(master)
    kernels.publish([weight])
    y = kernels.alloc((N, 20), np.float32)
    with np.errstate(invalid="ignore"):
        kernels.linear_forward(y, x, weight, b)
    affected = y[0] if where == "x" else y[:, 0]
    assert not np.isfinite(affected).any()
    assert np.isfinite(y[1:] if where == "x" else y[:, 1:]).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_inputs_and_weights(kernels_by_name, name):
    kernels = kernels_by_name[name]
    x, master, b = kernels.alloc((3, 64), np.float32), kernels.alloc((5, 64), np.float32), normal(kernels, 5)
    assert np.array_equal(product(kernels, x, normal(kernels, 5, 64), b)[2], np.tile(b, (3, 1)))
    assert np.array_equal(product(kernels, normal(kernels, 3, 64), master, b)[2], np.tile(b, (3, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_second_call_allocates_nothing(kernels_by_name, name):
    from numba.core.runtime import _nrt_python, rtsys

    _nrt_python.memsys_enable_stats()
    kernels = kernels_by_name[name]
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
    """Return the logits after the first ``prompt`` ids, and after each further id, of the last of S equal sequences."""
    decoder = Decoder(model, KVCache(model.config, model.kernels, 1, len(ids), prompt))
    found = [decoder.prefill(ids[:prompt])[-1].copy()]
    if S > 1:
        decoder = Decoder(model, KVCache(model.config, model.kernels, S, len(ids), S))
        for token in ids[:prompt]:
            decoder.step([token] * S)
    return np.stack(found + [decoder.step([token] * S)[-1].copy() for token in ids[prompt:]])


@pytest.mark.parametrize("name", NAMES)
def test_prompts_tokens_and_batches_agree(kernels_by_name, name):
    model = load_model(FIXTURES / "sampling_model.bin", kernels_by_name[name])
    ids = np.random.default_rng(3).integers(0, 120, 40).tolist()
    by_token, mixed, batched = logits_of(model, ids, 1), logits_of(model, ids, 30), logits_of(model, ids, 1, 8)
    assert np.abs(by_token[29:] - mixed).max() < (2e-3 if name == "int8" else 2e-4)
    error = np.abs(by_token[1:] - batched[1:]).max()
    assert error < 1e-4 if name == "fp32" else error == 0  # fp32 uses BLAS here: this model's rows are too short


def test_byte_and_float_products_agree(kernels_by_name):
    ids = np.random.default_rng(4).integers(0, 120, 40).tolist()
    bytewise, plain = (
        logits_of(load_model(FIXTURES / "sampling_model.bin", kernels_by_name[name]), ids, 1)
        for name in ("int8", "int8 plain")
    )
    assert np.abs(bytewise - plain).max() < 2e-3


def test_greedy_equals_transformers(kernels_by_name):
    model = load_model(FIXTURES / "sampling_model.bin", kernels_by_name["fp32"])
    for case in GOLDEN:
        assert [token for piece in generate(model, case["prompt"], GREEDY, 64) for token in piece.ids] == case["ids"]


def test_bad_weights_raise(kernels_by_name):
    for name in NAMES:
        model = load_model(FIXTURES / "sampling_model.bin", kernels_by_name[name])
        model.params["wte"][3, 3] = np.inf
        model.publish()
        with pytest.raises(DataError, match="llmc verify"):
            list(generate(model, [1], GREEDY))


def test_open_sampling_precisions(no_cupy):
    backend = open_sampling("auto", "auto", 1)
    assert (backend.precision, backend.threads, backend.kernels.precision) == ("fp32", 1, "fp32")
    assert "fp32: the default" in backend.reason
    assert "int8 weights" in open_sampling("cpu", "int8", 1).description
    with pytest.raises(UsageError, match="--precision int8: supported by llmc sample and llmc bench sample only"):
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
    """Run this file with kernels compiled for other processors."""
    if "avxvnni" in features and "avx_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-VNNI")
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "LLMC_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "not narrower"]
    subprocess.run(command, check=True, env=os.environ | settings, stdout=subprocess.DEVNULL)
