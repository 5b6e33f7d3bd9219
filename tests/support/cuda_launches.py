"""With which blocks and how much shared memory the backend launches its kernels: noted down while it is asked for every
operation, at the sizes of GPT-2's models and at the head sizes that are treated apart. Nothing is computed."""

from typing import NamedTuple

import numpy as np
from support.cuda_recording_device import RecordingDevice

from llmc_cli.kernels.cuda.kernels import CudaKernels

MODELS = ((768, 12), (1600, 25), (1024, 32), (1024, 8), (1024, 4))  # C, NH: d12 and d48, both of HS 64; HS 32, 128, 256
B, T = 4, 1024
V, Vp = 50257, 50304


class Most(NamedTuple):
    """The widest block and the most dynamic shared memory of a kernel's launches."""

    threads: int
    shared: int


def launches(bf16, capability):
    """(program, kernel): ``Most``, of all that a device of this capability is asked for."""
    notebook = RecordingDevice(bf16, capability)
    kernels = CudaKernels(notebook, "bf16" if bf16 else "fp32")
    for C, NH in MODELS:
        _train(kernels, notebook, C, NH)
        _sample(kernels, notebook, C, NH)
    found = {}
    for each in notebook.launched:
        before = found.get((each.program, each.kernel), Most(0, 0))
        found[each.program, each.kernel] = Most(max(before.threads, each.threads), max(before.shared, each.shared))
    return found


def _train(kernels, notebook, C, NH):
    N, F = B * T, 4 * C

    def real(*shape):
        return notebook.alloc(shape, notebook.real)

    def single(*shape):
        return notebook.alloc(shape, np.float32)

    ids = notebook.alloc((N,), np.int32)
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
    arena, number = single(P), notebook.alloc((1,), np.float64)
    segments, hyper = notebook.alloc((16, 3), np.int64), notebook.alloc((8,), np.float64)
    kernels.sum_squares(number, arena)
    kernels.adamw(arena, arena, arena, arena, segments, hyper, number)


def _sample(kernels, notebook, C, NH):
    """A prompt, and one token behind it, of one sequence and of several."""
    cache = notebook.alloc((B, NH, T, C // NH), notebook.real)
    lengths = notebook.alloc((B,), np.int32)
    for new in (T // 2, 1):
        out, qkv = (notebook.alloc((B, new, width), notebook.real) for width in (C, 3 * C))
        kernels.attention_cached(out, cache, cache, qkv, lengths, NH)
    matrix, up, head = (kernels.bind(notebook.alloc((rows, C), np.float32)) for rows in (C, 4 * C, Vp))
    b, wide_b = (notebook.alloc((size,), np.float32) for size in (C, 4 * C))
    for N in (1, B):
        x, wide = (notebook.alloc((N, width), notebook.real) for width in (C, 4 * C))
        kernels.linear_forward(x, x, matrix, b)
        kernels.linear_gelu_forward(wide, wide, x, up, wide_b)
        kernels.linear_forward(x, wide, kernels.bind(notebook.alloc((C, 4 * C), np.float32)), b)
        kernels.head_logits(notebook.alloc((N, V), np.float32), x, head)
