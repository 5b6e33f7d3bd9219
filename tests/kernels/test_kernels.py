"""Every operation of the CPU backend against the float64 reference, and properties that its kernels must have."""

import os
import platform
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from support.cpu_kernels import scratch_bytes, thread_limit

from llmc_cli.kernels.backend import open_kernels
from llmc_cli.kernels.cases import Case, cases, prepare, run
from llmc_cli.kernels.operations import OPERATIONS
from llmc_cli.kernels.reference.kernels import REFERENCE
from llmc_cli.verification.comparison import compare

USES_BLAS = [name for name, operation in OPERATIONS.items() if operation.matmul_outputs]
CASES = [case for operation in OPERATIONS for case in cases(operation)]


def normal(seed, *shape):
    """Return random numbers as float64 that float32 represents exactly."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def cpu():
    """Float32 kernels with the default matmul: tiles or BLAS."""
    return open_kernels("cpu", "fp32", 2).kernels


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def precise(request):
    """Kernels and their precision."""
    return open_kernels("cpu", request.param, 2).kernels, request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.label}")
def test_against_reference(precise, case):
    kernels, precision = precise
    found, expected = run(kernels, case), run(REFERENCE, case)
    for name, values in found.items():
        limit = OPERATIONS[case.operation].bound(name, precision)
        check = compare(case.operation, name, values, expected[name], limit)
        assert check.ok, check


@pytest.mark.soak
@pytest.mark.parametrize(("name", "features"), [("x86-64", "+sse2"), ("haswell", "+avx,+avx2,+fma")])
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names of x86 processors")
def test_kernels_compiled_for_older_processors(tmp_path, name, features):
    """Register tiles have other shapes there, so these tests run again in a process compiled for them."""
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "LLMC_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "against_reference or same_bits"]
    subprocess.run(command, check=True, env=os.environ | settings, stdout=subprocess.DEVNULL)


ONE_OF_EACH = list({case.operation: case for case in CASES}.values())
BLAS_FREE = [case for case in CASES if case.operation not in USES_BLAS]
WITH_BLAS = [case for case in CASES if case.operation in USES_BLAS]


@pytest.mark.parametrize("case", BLAS_FREE, ids=lambda case: f"{case.operation}-{case.label}")
def test_same_bits_with_one_thread_and_with_two(precise, case):
    cpu, _ = precise
    two = {name: value.tobytes() for name, value in run(cpu, case).items()}
    with thread_limit(cpu, 1):
        one = {name: value.tobytes() for name, value in run(cpu, case).items()}
    assert one == two


@pytest.mark.parametrize("case", WITH_BLAS, ids=lambda case: f"{case.operation}-{case.label}")
def test_same_bits_with_a_fixed_number_of_blas_threads(cpu, case):
    """The order of sums in BLAS depends on its own number of threads, so only numba's is changed."""
    import numba

    two = {name: value.tobytes() for name, value in run(cpu, case).items()}
    numba.set_num_threads(1)
    one = {name: value.tobytes() for name, value in run(cpu, case).items()}
    numba.set_num_threads(2)
    assert one == two


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.operation)
def test_repeated_call_allocates_nothing(precise, case):
    cpu, _ = precise
    from numba.core.runtime import _nrt_python, rtsys

    _nrt_python.memsys_enable_stats()
    args = prepare(cpu, case)
    operation = getattr(cpu, case.operation)
    operation(*args.values())
    operation(*args.values())
    before = rtsys.get_allocation_stats()
    tracemalloc.start()
    operation(*args.values())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    after = rtsys.get_allocation_stats()
    chunks = -(-len(args["x"]) // cpu.matmul.head_rows) if case.operation == "head_loss" else 1
    # numba allocates a header per array argument; an array allocated within a task would exceed this
    assert after.alloc - before.alloc <= 16 * chunks
    assert after.alloc - after.free == before.alloc - before.free
    assert peak < 8192  # views and tuples, not arrays


def test_alloc_is_aligned_and_zero(cpu):
    for shape, dtype in (((3,), np.float32), ((5, 7), np.int32), ((1,), np.float64)):
        array = cpu.alloc(shape, dtype)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0
        assert not array.any()


def test_large_arrays_are_zeroed(cpu, monkeypatch):
    monkeypatch.setattr("llmc_cli.kernels.cpu.kernels.PARALLEL_CLEAR", 1000)
    for size in (250, 999, 50_000):
        cpu.alloc((size,), np.float32)[:] = 1.0  # freed at once, and may be reused by the next
        assert not cpu.alloc((size,), np.float32).any()


def test_norm_outputs_may_replace_inputs(cpu):
    """res may be x, and dx may be dy or dres."""
    N, C = 9, 40
    x, delta, dy, dres = (cpu.alloc((N, C), np.float32) for _ in range(4))
    bias, w, b = (cpu.alloc((C,), np.float32) for _ in range(3))
    for seed, array in enumerate((x, delta, bias, w, b, dy, dres)):
        array[...] = normal(seed, *array.shape)
    res, y, dx = (cpu.alloc((N, C), np.float32) for _ in range(3))
    mean, rstd, dw, db = (cpu.alloc(shape, np.float32) for shape in ((N,), (N,), (C,), (C,)))
    cpu.residual_norm_forward(res, y, mean, rstd, x, delta, bias, w, b, 1e-5)
    again = np.empty_like(y)
    cpu.residual_norm_forward(x, again, mean, rstd, x, delta, bias, w, b, 1e-5)
    assert np.array_equal(x, res)
    assert np.array_equal(again, y)
    cpu.residual_norm_backward(dx, dw, db, dy, res, mean, rstd, w, dres, False)
    for taken in (dy.copy(), dres.copy()):
        same = taken[0, 0] == dres[0, 0]
        args = (dy, taken) if same else (taken, dres)
        cpu.residual_norm_backward(taken, dw, db, args[0], res, mean, rstd, w, args[1], False)
        assert np.array_equal(taken, dx)


def test_attention_is_causal(precise):
    cpu, _ = precise
    B, T, NH, HS = 1, 90, 2, 16
    qkv = normal(1, B, T, 3 * NH * HS).astype(np.float32)
    out, lse = np.empty((B, T, NH * HS), np.float32), np.empty((B, NH, T), np.float32)
    cpu.attention_forward(out, lse, qkv, NH)
    changed, other = qkv.copy(), np.empty_like(out)
    changed[:, 50:] = 7.0
    cpu.attention_forward(other, lse, changed, NH)
    assert np.array_equal(other[:, :50], out[:, :50])
    assert not np.array_equal(other[:, 50:], out[:, 50:])


def test_attention_with_large_scores(cpu):
    """Scores in the hundreds do not overflow, since the largest is subtracted before the exponential."""
    case = next(case for case in CASES if case.operation == "attention_forward" and case.label.startswith("B=2 T=65"))
    case = Case(case.operation, "large", {**case.args, "qkv": case.args["qkv"] * 16.0})
    found, expected = run(cpu, case), run(REFERENCE, case)
    # scores near 2000 carry errors near 1e-4, and the values are up to 70
    assert np.abs(found["out"] - expected["out"]).max() < 1e-2
    assert np.abs(found["lse"] - expected["lse"]).max() < 1e-6 * np.abs(expected["lse"]).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_propagate(precise, bad):
    """The trainer stops when the loss is not finite, so no kernel may hide a NaN or infinity."""
    cpu, _ = precise
    for operation, name, output in (
        ("linear_gelu_forward", "x", "act"),
        ("gelu_linear_backward", "dy", "dpre"),
        ("residual_norm_forward", "x", "y"),
        ("residual_norm_backward", "dy", "dx"),
        ("attention_forward", "qkv", "out"),
        ("attention_backward", "dout", "dqkv"),
        ("attention_cached", "qkv", "out"),
        ("head_loss", "x", "losses"),
        ("head_loss", "x", "dx"),
        ("sum_squares", "g", "out"),
        ("adamw", "g", "master"),
    ):
        case = next(
            c for c in reversed(CASES) if c.operation == operation and all(v is not None for v in c.args.values())
        )
        value = case.args[name].copy()
        row = 1 if value.shape[0] > 1 else 0  # not row 0: head_loss ignores it
        value[row if value.ndim < 3 else (0, 0)] = bad
        outputs = run(cpu, Case(operation, "bad", {**case.args, name: value}))
        assert not np.isfinite(outputs[output]).all(), (operation, name)


@pytest.mark.parametrize("operation", ["linear_gelu_forward", "gelu_linear_backward"])
def test_gelu_is_accurate_over_the_whole_range(cpu, operation):
    """Both signs of every float32 exponent, through an identity matrix, within a few units in the last place."""
    x = np.concatenate([np.logspace(-30, 30, 4001), np.linspace(-12.0, 12.0, 20_001)])
    x = np.concatenate([x, -x]).astype(np.float32)[:, None]
    ones, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    act, pre = np.empty_like(x), np.empty_like(x)
    expected = [np.empty(x.shape), np.empty(x.shape)]
    if operation == "linear_gelu_forward":
        cpu.linear_gelu_forward(act, pre, x, cpu.bind(ones), zero)
        REFERENCE.linear_gelu_forward(expected[0], expected[1], x.astype(float), np.ones((1, 1)), np.zeros(1))
        # where |gelu| < 1e-6 for large negative x only the absolute error matters
        assert (np.abs(act - expected[0]) <= 5e-7 * np.abs(expected[0]) + 1e-7 * np.minimum(1.0, np.abs(x))).all()
    else:
        dpre, dy = np.empty_like(x), np.ones_like(x)
        cpu.gelu_linear_backward(dpre, np.empty((1, 1), np.float32), zero.copy(), dy, x, x, cpu.bind(ones), False)
        with np.errstate(over="ignore"):
            REFERENCE.gelu_linear_backward(
                expected[0], np.zeros((1, 1)), np.zeros(1), dy.astype(float), x.astype(float), x.astype(float),
                np.ones((1, 1)), False,
            )  # fmt: skip
        assert np.abs(dpre - expected[0]).max() <= 1e-6


def test_head_loss_with_large_logits(cpu):
    """Logits of ±1e4 neither overflow nor lose the loss."""
    x = np.array([[1.0], [-1.0], [1.0]], np.float32)
    w = np.array([[1e4], [0.0], [-1e4], [7.0]], np.float32)
    losses = np.empty(3, np.float32)
    cpu.head_loss(losses, None, None, x, cpu.bind(w), np.array([0, 2, 1], np.int32), 3, 1.0, False)
    assert losses.tolist() == [0.0, 0.0, 1e4]


def test_workspace_bytes_bound_the_scratch_memory(precise):
    B, T, C, NH, V, Vp = 2, 40, 48, 3, 300, 384
    fresh = open_kernels("cpu", precise[1], 2).kernels
    for case in (
        Case("attention_backward", "", {"dqkv": np.zeros((B, T, 3 * C)), "dout": np.zeros((B, T, C)),
             "out": np.zeros((B, T, C)), "lse": np.zeros((B, NH, T)), "qkv": np.zeros((B, T, 3 * C)), "num_heads": NH}),
        Case("attention_forward", "", {"out": np.zeros((B, T, C)), "lse": np.zeros((B, NH, T)),
             "qkv": np.zeros((B, T, 3 * C)), "num_heads": NH}),
        Case("head_loss", "", {"losses": np.zeros(B * T), "dx": np.zeros((B * T, C)), "dw": np.zeros((Vp, C)),
             "x": np.zeros((B * T, C)), "w": np.zeros((Vp, C)), "targets": np.zeros(B * T, np.int32),
             "vocab_size": V, "dloss": 1.0, "acc": False}),
        Case("residual_norm_backward", "", {"dx": np.zeros((B * T, C)), "dw": np.zeros(C), "db": np.zeros(C),
             "dy": np.zeros((B * T, C)), "res": np.zeros((B * T, C)), "mean": np.zeros(B * T),
             "rstd": np.zeros(B * T), "w": np.zeros(C), "dres": None, "acc": False}),
        Case("sum_squares", "", {"out": np.zeros(1), "g": np.zeros(Vp * C)}),
    ):  # fmt: skip
        run(fresh, case)
    assert 0 < scratch_bytes(fresh, fresh.matmul) <= fresh.workspace_bytes(B, T, C, NH, Vp)
