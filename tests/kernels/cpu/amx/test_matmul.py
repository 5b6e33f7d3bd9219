"""Products on AMX tiles, real ones if the processor has them, and emulated ones, against float64."""

import importlib
import itertools
import sys

import numba
import numpy as np
import pytest
from support.cpu_kernels import scratch_bytes
from support.emulated_tiles import emulated, emulated_matmul

from llmc_cli.errors import MissingError
from llmc_cli.kernels.cpu import loading
from llmc_cli.kernels.cpu.amx import intrinsics
from llmc_cli.kernels.cpu.matmul import BlasMatmul
from llmc_cli.kernels.reference.kernels import gelu, gelu_derivative

BOUNDS = {1: 2.0**-7, 2: 2.0**-14, 3: 1e-6}
"""Bounds on the error relative to |a|·|b|, by the number of parts; they include the rounding of float32 sums."""

# sizes around those of tiles, blocks, pieces of k, and the number of rows above which a is divided
SIZES = [
    (1, 1, 1), (2, 3, 5), (16, 32, 32), (31, 33, 100), (33, 31, 31), (257, 100, 33), (100, 257, 1030), (513, 40, 65),
    (64, 700, 800),
]  # fmt: skip
EMULATED_SIZES = [(1, 1, 1), (33, 31, 100), (34, 97, 40), (97, 34, 1030)]


@pytest.fixture(scope="module", params=(1, 2, 3))
def tiles(request):
    if not intrinsics.available():
        pytest.skip("needs AMX tiles; emulated ones are tested everywhere")
    return loading.load(loading.tile_matmul(request.param)).TileMatmul(request.param)


@pytest.fixture(scope="module")
def emulation():
    return emulated()["matmul"]


def matrix(rng, rows, columns, extra, offset):
    """Return a random matrix with ``extra`` numbers after each row, ``offset`` numbers after an allocation's start."""
    flat = rng.standard_normal(offset + rows * (columns + extra), np.float32)
    return flat[offset:].reshape(rows, columns + extra)[:, :columns]


def check(multiply, M, N, K, transpose_a, transpose_b, mode, bound):
    rng = np.random.default_rng([M, N, K])
    a, b = (
        matrix(rng, *(shape[::-1] if transpose else shape), extra, offset)
        for shape, transpose, extra, offset in (((M, K), transpose_a, 3, 1), ((K, N), transpose_b, 0, 0))
    )
    surrounding = matrix(rng, M, N + 5, 0, 0)
    c, bias = surrounding[:, :N], rng.standard_normal(N, np.float32) if mode == "bias" else None
    padding, before = surrounding[:, N:].copy(), c.astype(np.float64)
    if mode != "acc":
        c[...] = np.nan
    act = matrix(rng, M, N, 2, 1) if mode == "gelu" else None
    pre = matrix(rng, M, N, 2, 1) if mode == "gelu backward" else None
    multiply(c, a, b, transpose_a=transpose_a, transpose_b=transpose_b, acc=mode == "acc", bias=bias, act=act, pre=pre)
    left, right = (x.T if transpose else x for x, transpose in ((a, transpose_a), (b, transpose_b)))
    start = before if mode == "acc" else np.zeros(N) if bias is None else bias.astype(np.float64)
    expected = left.astype(np.float64) @ right.astype(np.float64) + start
    scale = np.abs(left).astype(np.float64) @ np.abs(right).astype(np.float64) + np.abs(start)
    if act is not None:
        assert np.abs(act - gelu(c.astype(np.float64))).max() <= 1e-6 * np.abs(c).max()
    if pre is not None:
        derivative = gelu_derivative(pre.astype(np.float64))
        # near its zeros the error of the derivative itself dominates
        expected, scale = expected * derivative, scale * (np.abs(derivative) + 1e-6 / bound)
    assert (np.abs(c - expected) / scale).max() <= bound
    assert np.array_equal(surrounding[:, N:], padding)
    return c


MODES = ("overwrite", "acc", "bias", "gelu", "gelu backward")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_against_float64(tiles, M, N, K, mode):
    for transpose_a, transpose_b in itertools.product((False, True), repeat=2):
        check(tiles, M, N, K, transpose_a, transpose_b, mode, BOUNDS[len(tiles.parts)])


@pytest.mark.parametrize("parts", [1, 3])
def test_emulated(emulation, parts):
    multiply = emulated_matmul(emulation, parts)
    modes = itertools.cycle(MODES)
    for (M, N, K), transposes in itertools.product(EMULATED_SIZES, itertools.product((False, True), repeat=2)):
        check(multiply, M, N, K, *transposes, next(modes), BOUNDS[parts])


def test_emulation_agrees_with_tiles(tiles, emulation):
    """Only the order of sums differs."""
    if len(tiles.parts) == 2:
        return  # takes seconds to compile and tests nothing new
    a, b = (matrix(np.random.default_rng(seed), 40, 40, 0, 0) for seed in (1, 2))
    found, expected = np.empty((40, 40), np.float32), np.empty((40, 40), np.float32)
    tiles(found, a, b, transpose_b=True)
    emulated_matmul(emulation, len(tiles.parts))(expected, a, b, transpose_b=True)
    assert (np.abs(found - expected) <= 1e-6 * (np.abs(a) @ np.abs(b).T)).all()


def test_streamed_results_leave_surrounding_bytes(tiles):
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((300, 40), np.float32), rng.standard_normal((4100, 40), np.float32)
    raw = np.full(301 * 4112 * 4 + 64, 7, np.uint8)
    whole = raw[-raw.ctypes.data % 64 :][: 300 * 4112 * 4].view(np.float32).reshape(300, 4112)
    c = whole[:, :4100]
    assert c.ctypes.data % 64 == c.strides[0] % 64 == 0
    assert 4 * c.size >= sys.modules[type(tiles).__module__].STREAMED
    padding = whole[:, 4100:].copy()
    tiles(c, a, b, transpose_b=True)
    error = np.abs(c - a.astype(np.float64) @ b.T.astype(np.float64))
    assert (error <= BOUNDS[len(tiles.parts)] * (np.abs(a) @ np.abs(b).T)).all()
    assert np.array_equal(whole[:, 4100:], padding)


@pytest.mark.parametrize(("M", "N", "K"), [(600, 200, 1100), (100, 300, 900)])
def test_same_bits_with_any_number_of_threads(tiles, M, N, K):
    results = set()
    for threads in (1, 2):
        numba.set_num_threads(threads)
        results.add(check(tiles, M, N, K, False, True, "bias", BOUNDS[len(tiles.parts)]).tobytes())
    assert len(results) == 1


def test_six_products_are_as_accurate_as_blas(tiles):
    if len(tiles.parts) < 3:
        return
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((64, 3072), np.float32), rng.standard_normal((96, 3072), np.float32)
    expected = a.astype(np.float64) @ b.T.astype(np.float64)
    errors = []
    for multiply in (tiles, BlasMatmul()):
        c = np.empty((64, 96), np.float32)
        multiply(c, a, b, transpose_b=True)
        errors.append(np.sqrt(np.mean((c - expected) ** 2)))
    assert errors[0] <= 1.5 * errors[1]


def test_workspace_bytes_bound_scratch_memory(tiles):
    fresh = type(tiles)(len(tiles.parts))
    threads = numba.get_num_threads()
    sizes = [(300, 100, 200), (100, 600, 64)]
    for M, N, K in sizes:
        check(fresh, M, N, K, False, False, "overwrite", BOUNDS[len(tiles.parts)])
        assert 0 < scratch_bytes(fresh) <= fresh.workspace_bytes(sizes, threads)
    assert scratch_bytes(fresh) == fresh.workspace_bytes(sizes, threads)


def test_emulation_does_not_replace_real_modules(emulation):
    assert sys.modules.get("llmc_cli.kernels.cpu.amx.matmul") is not emulation
    assert importlib.import_module("llmc_cli.kernels.cpu.amx.panels").intrinsics is intrinsics


def test_missing_tiles_raise(monkeypatch, emulation):
    monkeypatch.setattr(emulation.intrinsics, "available", lambda: False)
    with pytest.raises(MissingError, match="no AMX tiles"):
        emulation.TileMatmul(1)
