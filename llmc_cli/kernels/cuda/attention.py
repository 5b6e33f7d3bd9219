"""Launches of attention.cu, attention_mma.cu (on tensor cores) and cached_attention.cu."""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.source import source
from llmc_cli.kernels.spec import Array

TILE = 64
"""Rows of a head that a block of attention.cu owns; its TILE, too."""

THREADS = 256
"""Of a block of attention.cu, and of ``cache_append``."""

CACHED_THREADS = 512
"""Of a block of ``attention_cached_64`` and ``_256``: 32 times the WARPS of cached_attention.cu."""

LARGEST = 256
"""The largest head size."""

MMA_SIZES = (64, 128)
"""Head sizes that attention_mma.cu is compiled for."""


class Launch(NamedTuple):
    """How a kernel of attention_mma.cu is launched."""

    threads: int
    rows: int  # of the sequence that a block owns
    shared: int  # bytes


@functools.cache
def launches() -> dict[str, Launch]:
    """The table in attention_mma.cu, which static_asserts there hold against the kernels: by names as KEYS_64."""
    rows = re.findall(r"^constexpr Launch (\w+) = \{(\d+), (\d+), (\d+)\};$", source("attention_mma"), re.MULTILINE)
    return {name: Launch(*map(int, numbers)) for name, *numbers in rows}


def backward_scratch(B: int, T: int, NH: int, HS: int) -> int:
    """Floats that ``attention_backward`` needs: one for each row of each head, and two on tensor cores."""
    return 2 * B * T * NH


def attention_forward(device: Device, out: Array, lse: Array, qkv: Array, num_heads: int) -> None:
    """As ``spec.Kernels.attention_forward``. One launch."""
    _, T, C = out.shape
    HS = _head_size(C, num_heads)
    if _on_tensor_cores(device, HS, out, qkv):
        _launch_mma(device, "forward", out, num_heads, (out, lse, qkv))
    else:
        _launch_tiles(device, "attention_forward", out, num_heads, (out, lse, qkv, *_scalars(T, num_heads, HS)))


def attention_backward(
    device: Device, dqkv: Array, dout: Array, out: Array, lse: Array, qkv: Array, num_heads: int, scratch: Array,
    queries: Array,
) -> None:  # fmt: skip
    """As ``spec.Kernels.attention_backward``. Three launches. ``scratch``: float32, of at least ``backward_scratch``
    elements, aligned to 8 bytes; ``queries`` (B,T,C), for q while dq takes its place."""
    B, T, C = out.shape
    NH, HS = num_heads, _head_size(C, num_heads)
    sizes = np.int32(B), np.int32(T), np.int32(NH)
    if _on_tensor_cores(device, HS, dqkv, dout, out, qkv, queries):
        launch = launches()[f"DELTA_{HS}"]
        grid = (math.ceil(out.size / 8 / launch.threads),)
        name = f"attention_mma_delta_{HS}"
        device.launch("attention_mma", name, grid, (launch.threads,), (scratch, queries, lse, dout, out, qkv, *sizes))
        _launch_mma(device, "queries", out, NH, (dqkv, qkv, dout, scratch))
        _launch_mma(device, "keys", out, NH, (dqkv, qkv, dout, scratch, queries))
        return
    grid = (math.ceil(B * T * NH / (THREADS // 32)),)
    delta = (scratch, queries, dout, out, qkv, *sizes, np.int32(HS))
    device.launch("attention", "attention_delta", grid, (THREADS,), delta)
    arrays, scalars = (dqkv, qkv, dout, lse, scratch), _scalars(T, NH, HS)
    _launch_tiles(device, "attention_backward_queries", out, NH, (*arrays, *scalars))
    _launch_tiles(device, "attention_backward_keys", out, NH, (*arrays, queries, *scalars))


def attention_cached(
    device: Device, out: Array, keys: Array, values: Array, qkv: Array, lengths: Array, num_heads: int
) -> None:
    """As ``spec.Kernels.attention_cached``. Two launches; lengths are read on the device, and their grids depend on the
    shapes only."""
    S, T, C = out.shape
    NH, HS = num_heads, _head_size(C, num_heads)
    sizes = np.int32(NH), np.int32(HS), np.int32(keys.shape[2])
    append = (keys, values, qkv, lengths, np.int32(S), np.int32(T), *sizes)
    device.launch("cached_attention", "cache_append", (math.ceil(out.size / THREADS),), (THREADS,), append)
    if T == 1:
        token = (out, qkv, keys, values, lengths, *sizes, _scale(HS))
        name = f"attention_cached_{_width(HS)}"
        device.launch("cached_attention", name, (NH, S), (CACHED_THREADS,), token)
    else:
        prompt = (out, qkv, keys, values, lengths, np.int32(T), *sizes, _scale(HS))
        _launch_tiles(device, "attention_prompt", out, NH, prompt)


def _head_size(C: int, NH: int) -> int:
    """HS; ValueError for one that no kernel takes."""
    HS = C // NH
    if HS > LARGEST:
        raise ValueError(f"attention on CUDA takes heads of up to {LARGEST}, not of {HS}")
    return HS


def _scale(HS: int) -> np.float32:
    return np.float32(1.0 / math.sqrt(HS))


def _scalars(T: int, NH: int, HS: int) -> tuple[np.int32, np.int32, np.int32, np.float32]:
    return np.int32(T), np.int32(NH), np.int32(HS), _scale(HS)


def _width(HS: int) -> int:
    """The columns of a head that a kernel of any head size is compiled for."""
    return 64 if HS <= 64 else LARGEST


def _on_tensor_cores(device: Device, HS: int, *arrays: Array) -> bool:
    """Whether attention_mma.cu serves, which reads and writes 16 bytes at a time."""
    fits = device.real is np.uint16 and device.tensor_cores and HS in MMA_SIZES
    return fits and all(array.data.ptr % 16 == 0 for array in arrays)


def _launch_mma(device: Device, kernel: str, out: Array, NH: int, arrays: tuple[Array, ...]) -> None:
    B, T, C = out.shape
    HS = C // NH
    launch = launches()[f"{kernel.upper()}_{HS}"]
    grid = (math.ceil(T / launch.rows), NH, B)
    args = (*arrays, np.int32(T), np.int32(NH), _scale(HS))
    device.launch("attention_mma", f"attention_mma_{kernel}_{HS}", grid, (launch.threads,), args, launch.shared)


def _launch_tiles(device: Device, kernel: str, out: Array, NH: int, args: tuple[Array | np.generic, ...]) -> None:
    B, T, C = out.shape
    grid = (math.ceil(T / TILE), NH, B)
    device.launch("attention", f"{kernel}_{_width(C // NH)}", grid, (THREADS,), args)
