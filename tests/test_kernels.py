"""Every operation of every backend against the float64 reference, on shapes that divide nothing."""

import inspect
import itertools
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest

from llmc_cli.device import open_kernels
from llmc_cli.kernels import spec
from llmc_cli.kernels.reference.kernels import ReferenceKernels

REFERENCE = ReferenceKernels()
FLOAT64 = ("hyper", "sumsq")  # double precision in every backend, and so is sum_squares' output

OUTPUTS = {  # operation: {output: bound on max|error| / max|reference| in float32}
    "embedding_forward": {"x": 1e-7},
    "embedding_backward": {"dwte": 1e-6, "dwpe": 1e-6},
    "residual_norm_forward": {"res": 1e-7, "y": 2e-6, "mean": 1e-6, "rstd": 1e-6},
    "residual_norm_backward": {"dx": 2e-6, "dw": 2e-6, "db": 2e-6},
    "linear_forward": {"y": 2e-6},
    "linear_backward": {"dx": 2e-6, "dw": 2e-6, "db": 2e-6},
    "linear_gelu_forward": {"act": 2e-6, "pre": 2e-6},
    "gelu_linear_backward": {"dpre": 2e-6, "dw": 2e-6, "db": 2e-6},
    "attention_forward": {"out": 2e-6, "lse": 1e-6},
    "attention_backward": {"dqkv": 5e-6},
    "attention_cached": {"out": 2e-6, "keys": 0.0, "values": 0.0},
    "head_loss": {"losses": 1e-6, "dx": 5e-6, "dw": 5e-6},
    "head_logits": {"logits": 2e-6},
    "sum_squares": {"out": 1e-12},
    "adamw": {"master": 2e-7, "m": 1e-6, "v": 1e-6},
}
KEPT = {  # outputs that are updated in place or added to in any case: they start with the case's own values
    "embedding_backward": ("dwte",),
    "attention_cached": ("keys", "values"),
    "adamw": ("master", "m", "v"),
}
WEIGHTS = ("w",)  # in these operations ``w`` is a bound weight; in the norms it is a vector
BOUND_WEIGHT = ("linear_forward", "linear_backward", "linear_gelu_forward", "gelu_linear_backward",
                "head_loss", "head_logits")  # fmt: skip


@dataclass
class Case:
    """One call: ``args`` by name, outputs as arrays whose values count only where the operation keeps or adds."""

    operation: str
    label: str
    args: dict = field(repr=False)


def normal(seed, *shape, scale=1.0):
    """Numbers that float32 holds exactly, in float64."""
    drawn = np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return drawn.astype(np.float64)


def integers(seed, low, high, size):
    return np.random.default_rng([seed, size]).integers(low, high, size, dtype=np.int32)


def with_acc(operation, label, args):
    return [Case(operation, f"{label}-acc" if acc else label, {**args, "acc": acc}) for acc in (False, True)]


def embedding_cases():
    for V, T, N, C in ((5, 3, 7, 1), (11, 8, 16, 66), (50, 40, 333, 96)):
        args = {
            "wte": normal(1, V, C),
            "wpe": normal(2, T, C),
            "ids": integers(3, 0, V, N),
            "positions": integers(4, 0, max(1, T - 1), N),
        }
        yield Case("embedding_forward", f"N{N}C{C}", {"x": normal(5, N, C), **args})
        gradients = {"dwte": normal(6, V, C), "dwpe": normal(7, T, C), "dx": normal(8, N, C)}
        yield from with_acc(
            "embedding_backward", f"N{N}C{C}", {**gradients, "ids": args["ids"], "positions": args["positions"]}
        )


def norm_cases():
    for N, C in ((1, 3), (5, 17), (33, 64), (70, 200)):
        x, delta, w, b = normal(1, N, C, scale=3.0) + 0.5, normal(2, N, C), normal(3, C), normal(4, C)
        outputs = {"res": normal(5, N, C), "y": normal(6, N, C), "mean": normal(7, N), "rstd": normal(8, N)}
        inputs = {"x": x, "delta": delta, "w": w, "b": b, "eps": 1e-5}
        yield Case("residual_norm_forward", f"N{N}C{C}", {**outputs, **inputs})
        yield Case("residual_norm_forward", f"N{N}C{C}-first", {**outputs, **inputs, "delta": None})
        REFERENCE.residual_norm_forward(*{**outputs, **inputs}.values())
        args = {
            "dx": normal(9, N, C), "dw": normal(10, C), "db": normal(11, C),
            "dy": normal(12, N, C), "res": outputs["res"], "mean": outputs["mean"], "rstd": outputs["rstd"],
            "w": w, "dres": normal(13, N, C),
        }  # fmt: skip
        yield from with_acc("residual_norm_backward", f"N{N}C{C}", args)
        yield from with_acc("residual_norm_backward", f"N{N}C{C}-last", {**args, "dres": None})


def linear_cases():
    for N, C, F in ((1, 1, 1), (1, 24, 40), (7, 5, 13), (64, 48, 130), (130, 96, 33)):
        x, w, b, dy = normal(1, N, C), normal(2, F, C), normal(3, F), normal(4, N, F)
        label = f"N{N}I{C}O{F}"
        yield Case("linear_forward", label, {"y": normal(5, N, F), "x": x, "w": w, "b": b})
        yield Case("linear_forward", f"{label}-nobias", {"y": normal(5, N, F), "x": x, "w": w, "b": None})
        args = {"dx": normal(6, N, C), "dw": normal(7, F, C), "db": normal(8, F), "dy": dy, "x": x, "w": w}
        yield from with_acc("linear_backward", label, args)
        yield from with_acc("linear_backward", f"{label}-nobias", {**args, "db": None})
        yield from with_acc("linear_backward", f"{label}-first", {**args, "dx": None})
        yield Case(
            "linear_gelu_forward", label, {"act": normal(9, N, F), "pre": normal(10, N, F), "x": x, "w": w, "b": b}
        )
        pre = normal(11, N, F, scale=3.0)
        pre[0, :1] = -40.0
        act = pre.copy()  # any values: the operation uses them for dw only
        args = {
            "dpre": normal(12, N, F), "dw": normal(13, C, F), "db": normal(14, C),
            "dy": normal(15, N, C), "act": act, "pre": pre, "w": normal(16, C, F),
        }  # fmt: skip
        yield from with_acc("gelu_linear_backward", label, args)


def attention_cases():
    shapes = [(1, T, 2, 8) for T in (1, 2, 31, 33, 64, 100, 257)]
    shapes += [(2, 33, 3, 1), (1, 70, 1, 16), (2, 65, 2, 64), (1, 40, 2, 80)]
    for B, T, NH, HS in shapes:
        C = NH * HS
        qkv = normal(1, B, T, 3 * C, scale=1.5)
        out, lse = np.zeros((B, T, C)), np.zeros((B, NH, T))
        forward = {"out": out, "lse": lse, "qkv": qkv, "num_heads": NH}
        yield Case("attention_forward", f"B{B}T{T}NH{NH}HS{HS}", forward)
        REFERENCE.attention_forward(out, lse, qkv, NH)
        yield Case(
            "attention_backward",
            f"B{B}T{T}NH{NH}HS{HS}",
            {"dqkv": normal(2, B, T, 3 * C), "dout": normal(3, B, T, C), **forward},
        )


def cached_cases():
    for T, NH, HS, lengths, Tmax in (
        (1, 2, 8, (0,), 4),
        (1, 3, 16, (5, 0, 63), 64),
        (2, 1, 1, (3, 30), 33),
        (5, 2, 64, (0, 90), 100),
        (33, 2, 80, (0, 31, 64), 100),
        (70, 1, 8, (0, 1), 71),
    ):
        S, C = len(lengths), NH * HS
        args = {
            "out": normal(1, S, T, C),
            "keys": normal(2, S, NH, Tmax, HS),
            "values": normal(3, S, NH, Tmax, HS),
            "qkv": normal(4, S, T, 3 * C),
            "lengths": np.array(lengths, np.int32),
            "num_heads": NH,
        }
        yield Case("attention_cached", f"S{S}T{T}NH{NH}HS{HS}", args)


def head_cases():
    for N, C, V, Vp in ((1, 3, 5, 8), (9, 17, 100, 128), (300, 24, 250, 256)):
        x, w, targets = normal(1, N, C), normal(2, Vp, C), integers(3, 0, V, N)
        targets[::4] = -1 if N > 1 else targets[::4]
        args = {
            "losses": normal(4, N), "dx": normal(5, N, C), "dw": normal(6, Vp, C),
            "x": x, "w": w, "targets": targets, "vocab_size": V, "dloss": 1.0 / N,
        }  # fmt: skip
        yield from with_acc("head_loss", f"N{N}C{C}V{V}", args)
        yield Case("head_loss", f"N{N}C{C}V{V}-loss", {**args, "dx": None, "dw": None, "acc": False})
        yield Case("head_logits", f"R{N}C{C}V{V}", {"logits": normal(7, N, V), "x": x, "w": w})


def optimizer_cases():
    for P in (1, 1000, 40_000, 300_001):
        g = normal(1, P)
        yield Case("sum_squares", f"P{P}", {"out": np.zeros(1), "g": g})
        cuts = sorted({0, P // 3, P // 2, P})
        segments = np.array([(a, b - a, n % 2) for n, (a, b) in enumerate(itertools.pairwise(cuts))], np.int64)
        for label, max_norm in (("clipped", 0.3), ("loose", 1e9), ("unclipped", 0.0)):
            hyper = np.array([1e-2, 0.9, 0.95, 1e-8, 0.1, 1 - 0.9**3, 1 - 0.95**3, max_norm])
            args = {
                "master": normal(2, P), "m": normal(3, P, scale=0.1), "v": normal(4, P, scale=0.1) ** 2,
                "g": g, "segments": segments, "hyper": hyper, "sumsq": np.array([np.dot(g, g)]),
            }  # fmt: skip
            yield Case("adamw", f"P{P}-{label}", args)


CASES = [
    case
    for make in (embedding_cases, norm_cases, linear_cases, attention_cases, cached_cases, head_cases, optimizer_cases)
    for case in make()
]


def parameters(operation):
    return [name for name in inspect.signature(getattr(spec.Kernels, operation)).parameters if name != "self"]


def prepare(kernels, case):
    """The arguments of ``case`` as arrays of ``kernels`` in order: outputs that are overwritten hold NaN."""
    kept = KEPT.get(case.operation, ())
    args = {}
    for name in parameters(case.operation):
        value = case.args[name]
        if not isinstance(value, np.ndarray):
            args[name] = value
            continue
        double = name in FLOAT64 or (case.operation == "sum_squares" and name == "out")
        dtype = value.dtype if value.dtype != np.float64 or double else kernels.dtype
        array = kernels.alloc(value.shape, dtype)
        array[...] = value
        added = case.args.get("acc") and name in ("dw", "db", "dwpe")
        if name in OUTPUTS[case.operation] and name not in kept and not added:
            array[...] = np.nan
        if name in WEIGHTS and case.operation in BOUND_WEIGHT:
            args[name] = kernels.bind(array)
            kernels.publish([args[name]])
        else:
            args[name] = array
    return args


def run(kernels, case):
    """The outputs of ``case`` by name."""
    args = prepare(kernels, case)
    getattr(kernels, case.operation)(*args.values())
    return {name: args[name] for name in OUTPUTS[case.operation] if args[name] is not None}


@pytest.fixture(scope="module")
def cpu():
    return open_kernels("cpu", "fp32", 2).kernels


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.label}")
def test_against_reference(cpu, case):
    found, expected = run(cpu, case), run(REFERENCE, case)
    for name, bound in OUTPUTS[case.operation].items():
        if name not in found or (name == "res" and case.args["delta"] is None):
            continue
        assert np.isfinite(found[name]).all(), name
        largest = np.abs(expected[name]).max()
        error = np.abs(found[name] - expected[name]).max()
        assert error <= bound * largest + 1e-30, f"{name}: error {error:.3e}, largest value {largest:.3e}"


def test_every_operation_has_cases():
    operations = {name for name, value in vars(spec.Kernels).items() if inspect.isfunction(value)}
    operations -= {"alloc", "bind", "publish"} | {name for name in operations if name.startswith("_")}
    assert operations == {case.operation for case in CASES} == set(OUTPUTS)


ONE_OF_EACH = list({case.operation: case for case in CASES}.values())
BLAS_FREE = [case for case in CASES if case.operation not in BOUND_WEIGHT]


@pytest.mark.parametrize("case", BLAS_FREE, ids=lambda case: f"{case.operation}-{case.label}")
def test_same_bits_with_one_thread_and_two(cpu, case):
    two = {name: value.tobytes() for name, value in run(cpu, case).items()}
    with cpu.limited_to(1):
        one = {name: value.tobytes() for name, value in run(cpu, case).items()}
    assert one == two


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.operation)
def test_a_second_call_allocates_nothing(cpu, case):
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
    assert after.alloc - before.alloc <= 16  # numba's header of each array argument; an array made in a task adds more
    assert after.alloc - after.free == before.alloc - before.free
    assert peak < 8192  # views and tuples, not arrays


def test_alloc_is_aligned_and_zero(cpu):
    for shape, dtype in (((3,), np.float32), ((5, 7), np.int32), ((1,), np.float64)):
        array = cpu.alloc(shape, dtype)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % 64 == 0
        assert not array.any()


def test_norms_in_place(cpu):
    """The stream may be added to in place, and its gradient may replace what reaches the norm."""
    N, C = 9, 40
    x, delta, w, b, dy, dres = (cpu.alloc(shape, np.float32) for shape in ((N, C), (N, C), (C,), (C,), (N, C), (N, C)))
    for seed, array in enumerate((x, delta, w, b, dy, dres)):
        array[...] = normal(seed, *array.shape)
    res, y, dx = (cpu.alloc((N, C), np.float32) for _ in range(3))
    mean, rstd, dw, db = (cpu.alloc(shape, np.float32) for shape in ((N,), (N,), (C,), (C,)))
    cpu.residual_norm_forward(res, y, mean, rstd, x, delta, w, b, 1e-5)
    again = np.empty_like(y)
    cpu.residual_norm_forward(x, again, mean, rstd, x, delta, w, b, 1e-5)
    assert np.array_equal(x, res)
    assert np.array_equal(again, y)
    cpu.residual_norm_backward(dx, dw, db, dy, res, mean, rstd, w, dres, False)
    for taken in (dy.copy(), dres.copy()):
        same = taken[0, 0] == dres[0, 0]
        args = (dy, taken) if same else (taken, dres)
        cpu.residual_norm_backward(taken, dw, db, args[0], res, mean, rstd, w, args[1], False)
        assert np.array_equal(taken, dx)


def test_attention_does_not_see_the_future(cpu):
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
    """Scores in the hundreds: the largest is subtracted before the exponential."""
    case = next(case for case in CASES if case.operation == "attention_forward" and case.label.startswith("B2T65"))
    case = Case(case.operation, "large", {**case.args, "qkv": case.args["qkv"] * 16.0})
    found, expected = run(cpu, case), run(REFERENCE, case)
    assert (
        np.abs(found["out"] - expected["out"]).max() < 1e-2
    )  # scores near 1000 carry errors near 1e-4, values reach 70
    assert np.abs(found["lse"] / expected["lse"] - 1.0).max() < 1e-6


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(cpu, bad):
    """The trainer stops at a loss that is not finite, so no kernel may hide one."""
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
        case = next(c for c in reversed(CASES) if c.operation == operation and not c.label.endswith("-loss"))
        value = case.args[name].copy()
        row = 1 if value.shape[0] > 1 else 0  # not row 0: head_loss ignores it
        value[row if value.ndim < 3 else (0, 0)] = bad
        outputs = run(cpu, Case(operation, "bad", {**case.args, name: value}))
        assert not np.isfinite(outputs[output]).all(), (operation, name)


@pytest.mark.parametrize("operation", ["linear_gelu_forward", "gelu_linear_backward"])
def test_gelu_over_its_whole_range(cpu, operation):
    """Through an identity matrix: every float32 exponent of both signs, error within a few units in the last place."""
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


def test_workspace_is_planned(cpu):
    """``workspace_bytes`` says what the scratch memory of a training step comes to."""
    B, T, C, NH, V, Vp = 2, 40, 48, 3, 300, 384
    fresh = type(cpu)(2)
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
    assert 0 < fresh.scratch_bytes() <= fresh.workspace_bytes(B, T, C, NH, Vp)
