"""Launches of attention.cu, attention_mma.cu (tensor cores) and cached_attention.cu."""

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.source import source
from llmc_cli.kernels.spec import Array

TILE = 64
"""Rows of a head per block of attention.cu; also a constant there."""

THREADS = 256
"""Threads per block of attention.cu and of ``cache_append``."""

CACHED_THREADS = 512
"""Threads per block of ``attention_cached_64`` and ``_256``: 32 times WARPS in cached_attention.cu."""

MAX_HEAD_SIZE = 256

MMA_SIZES = (64, 128)
"""Head sizes that attention_mma.cu is compiled for."""


class Launch(NamedTuple):
    """Launch parameters of a kernel of attention_mma.cu."""

    threads: int
    rows: int  # rows of the sequence per block
    shared: int  # bytes of dynamic shared memory


@functools.cache
def launches() -> dict[str, Launch]:
    """Return the launch table of attention_mma.cu by names such as KEYS_64. Static assertions there check it against
    the kernels."""
    rows = re.findall(r"^constexpr Launch (\w+) = \{(\d+), (\d+), (\d+)\};$", source("attention_mma"), re.MULTILINE)
    return {name: Launch(*map(int, numbers)) for name, *numbers in rows}


def backward_scratch(B: int, T: int, NH: int, HS: int) -> int:
    """Return the scratch floats that ``attention_backward`` needs: up to two per row and head."""
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
    """As ``spec.Kernels.attention_backward``. Three launches. ``scratch`` is float32, has at least
    ``backward_scratch`` elements and is aligned to 8 bytes. ``queries`` (B,T,C) receives a copy of q, which dq may
    overwrite."""
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
    """As ``spec.Kernels.attention_cached``. Two launches. lengths are read on the device, and the grids depend only on
    the shapes."""
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
    """Return HS. Raise ValueError if no kernel supports it."""
    HS = C // NH
    if HS > MAX_HEAD_SIZE:
        raise ValueError(f"--device cuda: head size {HS} is not supported; the maximum is {MAX_HEAD_SIZE}")
    return HS


def _scale(HS: int) -> np.float32:
    return np.float32(1.0 / math.sqrt(HS))


def _scalars(T: int, NH: int, HS: int) -> tuple[np.int32, np.int32, np.int32, np.float32]:
    return np.int32(T), np.int32(NH), np.int32(HS), _scale(HS)


def _width(HS: int) -> int:
    """Return the head size, 64 or 256, of the kernel variant for HS in attention.cu and cached_attention.cu."""
    return 64 if HS <= 64 else MAX_HEAD_SIZE


def _on_tensor_cores(device: Device, HS: int, *arrays: Array) -> bool:
    """Return whether attention_mma.cu can be used, which requires arrays aligned to 16 bytes."""
    supported = device.real is np.uint16 and device.tensor_cores and HS in MMA_SIZES
    return supported and all(array.data.ptr % 16 == 0 for array in arrays)


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
