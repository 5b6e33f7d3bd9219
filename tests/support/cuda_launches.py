"""Block sizes and shared memory of the backend's launches, recorded for every operation at the sizes of GPT-2's models
and for each head size that has its own kernels. Nothing is computed."""

from typing import NamedTuple

import numpy as np
from support.cuda_recording_device import RecordingDevice

from llmc_cli.kernels.cuda.kernels import CudaKernels

MODELS = ((768, 12), (1600, 25), (1024, 32), (1024, 8), (1024, 4))  # C, NH: d12 and d48, both of HS 64; HS 32, 128, 256
B, T = 4, 1024
V, Vp = 50257, 50304


class Maximum(NamedTuple):
    """The largest block and the most dynamic shared memory among a kernel's launches."""

    threads: int
    shared: int


def launches(bf16, capability):
    """Return {(program, kernel): Maximum} over all launches on a device of this compute capability."""
    device = RecordingDevice(bf16, capability)
    kernels = CudaKernels(device, "bf16" if bf16 else "fp32")
    for C, NH in MODELS:
        _train(kernels, device, C, NH)
        _sample(kernels, device, C, NH)
    found = {}
    for each in device.launched:
        before = found.get((each.program, each.kernel), Maximum(0, 0))
        found[each.program, each.kernel] = Maximum(max(before.threads, each.threads), max(before.shared, each.shared))
    return found


def _train(kernels, device, C, NH):
    N, F = B * T, 4 * C

    def real(*shape):
        return device.alloc(shape, device.real)

    def single(*shape):
        return device.alloc(shape, np.float32)

    ids = device.alloc((N,), np.int32)
    x, wide, qkv, stats, lse = real(N, C), real(N, F), real(B, T, 3 * C), single(N), single(B, NH, T)
    wte, wpe, b, wide_b = single(Vp, C), single(T, C), single(C), single(F)
    matrix, up, down, head = (kernels.bind(each) for each in (single(C, C), single(F, C), single(C, F), wte))
    kernels.publish([matrix, up, down, head])
    kernels.embedding_forward(x, wte, wpe, ids, ids)
    kernels.embedding_backward(wte, wpe, x, ids, ids, False)
    kernels.residual_norm_forward(x, real(N, C), stats, stats, x, real(N, C), b, b, b, 1e-5)
    kernels.residual_norm_backward(x, b, b, x, x, stats, stats, b, x, False)
    kernels.linear_forward(x, x, matrix, b)
    kernels.linear_backward(x, single(C, C), b, x, x, matrix, False)
    kernels.linear_gelu_forward(wide, wide, x, up, wide_b)
    kernels.gelu_forward(wide, wide)
    kernels.gelu_linear_backward(wide, single(C, F), b, x, wide, wide, down, False)
    kernels.attention_forward(x.reshape(B, T, C), lse, qkv, NH)
    kernels.attention_backward(qkv, x.reshape(B, T, C), x.reshape(B, T, C), lse, qkv, NH)
    kernels.head_loss(stats, x, wte, x, head, ids, V, 1.0, False)
    P = 1 << 20
    arena, number = single(P), device.alloc((1,), np.float64)
    segments, hyper = device.alloc((16, 3), np.int64), device.alloc((8,), np.float64)
    kernels.sum_squares(number, arena)
    kernels.adamw(arena, arena, arena, arena, segments, hyper, number)


def _sample(kernels, device, C, NH):
    """A prompt, and one token behind it, of one sequence and of several."""
    cache = device.alloc((B, NH, T, C // NH), device.real)
    lengths = device.alloc((B,), np.int32)
    for new in (T // 2, 1):
        out, qkv = (device.alloc((B, new, width), device.real) for width in (C, 3 * C))
        kernels.attention_cached(out, cache, cache, qkv, lengths, NH)
    matrix, up, head = (kernels.bind(device.alloc((rows, C), np.float32)) for rows in (C, 4 * C, Vp))
    b, wide_b = (device.alloc((size,), np.float32) for size in (C, 4 * C))
    for N in (1, B):
        x, wide = (device.alloc((N, width), device.real) for width in (C, 4 * C))
        kernels.linear_forward(x, x, matrix, b)
        kernels.linear_gelu_forward(wide, wide, x, up, wide_b)
        kernels.linear_forward(x, wide, kernels.bind(device.alloc((C, 4 * C), np.float32)), b)
        kernels.head_logits(device.alloc((N, V), np.float32), x, head)
