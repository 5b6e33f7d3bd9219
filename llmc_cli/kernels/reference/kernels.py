"""The reference backend: every operation in float64 NumPy, written for clarity, not speed."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int32 = NDArray[np.int32]

GELU_SLOPE = np.sqrt(2.0 / np.pi)
GELU_CUBIC = 0.044715


def store(target: Float64, value: Float64, acc: bool) -> None:
    """Overwrite ``target`` with ``value``, or with ``acc`` add it."""
    if acc:
        target += value
    else:
        target[...] = value


def gelu(x: Float64) -> Float64:
    """x/2 · (1 + tanh(sqrt(2/pi) · (x + 0.044715 x³)))."""
    result: Float64 = 0.5 * x * (1.0 + np.tanh(GELU_SLOPE * (x + GELU_CUBIC * x**3)))
    return result


def gelu_derivative(x: Float64) -> Float64:
    """d gelu / dx."""
    tanh = np.tanh(GELU_SLOPE * (x + GELU_CUBIC * x**3))
    result: Float64 = 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * GELU_SLOPE * (1.0 + 3.0 * GELU_CUBIC * x**2)
    return result


def causal_probabilities(q: Float64, k: Float64, offset: int = 0) -> tuple[Float64, Float64]:
    """Return softmax(q·kᵀ/sqrt(HS)) (Tq,Tk), masked entries 0, and the logarithm of its denominator (Tq,).

    q (Tq,HS), k (Tk,HS). Query t attends to the first ``offset`` + t + 1 keys.
    """
    scores = q @ k.T / np.sqrt(q.shape[1])
    visible = np.arange(k.shape[0])[None, :] <= np.arange(q.shape[0])[:, None] + offset
    scores = np.where(visible, scores, -np.inf)
    largest = scores.max(axis=1, keepdims=True)
    exponentials = np.exp(scores - largest)
    total = exponentials.sum(axis=1, keepdims=True)
    return exponentials / total, (largest + np.log(total))[:, 0]


class ReferenceKernels:
    """``spec.Kernels`` in float64. A weight is its master array."""

    name: str = "reference"
    device_name: str = ""
    dtype: Any = np.float64
    activation_dtype: Any = np.float64

    def alloc(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def upload(self, array: NDArray[Any], values: NDArray[Any]) -> None:
        if array is not values:
            array[...] = values

    def upload_async(self, array: NDArray[Any], values: NDArray[Any]) -> None:
        self.upload(array, values)

    def download(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def copy(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        target[...] = source

    def synchronize(self) -> None:
        pass

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def launch_count(self) -> int:
        return 0

    def held_bytes(self) -> int:
        return 0

    def release_memory(self) -> None:
        pass

    def workspace_bytes(self, B: int, T: int, channels: int, num_heads: int, padded_vocab_size: int) -> int:
        return 0  # temporary arrays are not kept

    def bind_bytes(self, numbers: int) -> int:
        return 0

    def bind(self, master: Float64) -> Float64:
        return master

    def publish(self, weights: list[Float64]) -> None:
        pass

    def embedding_forward(self, x: Float64, wte: Float64, wpe: Float64, ids: Int32, positions: Int32) -> None:
        x[...] = wte[ids] + wpe[positions]

    def embedding_backward(
        self, dwte: Float64, dwpe: Float64, dx: Float64, ids: Int32, positions: Int32, acc: bool
    ) -> None:
        if not acc:
            dwpe[...] = 0.0
        np.add.at(dwte, ids, dx)
        np.add.at(dwpe, positions, dx)

    def residual_norm_forward(
        self, res: Float64, y: Float64, mean: Float64, rstd: Float64,
        x: Float64, delta: Float64 | None, bias: Float64 | None, w: Float64, b: Float64, eps: float,
    ) -> None:  # fmt: skip
        if delta is not None:
            res[...] = x + delta if bias is None else x + delta + bias
            x = res
        mean[...] = x.mean(axis=1)
        rstd[...] = 1.0 / np.sqrt(x.var(axis=1) + eps)
        y[...] = (x - mean[:, None]) * rstd[:, None] * w + b

    def residual_norm_backward(
        self, dx: Float64, dw: Float64, db: Float64,
        dy: Float64, res: Float64, mean: Float64, rstd: Float64, w: Float64, dres: Float64 | None, acc: bool,
    ) -> None:  # fmt: skip
        normed = (res - mean[:, None]) * rstd[:, None]  # (N, C)
        store(dw, (dy * normed).sum(axis=0), acc)
        store(db, dy.sum(axis=0), acc)
        dnormed = dy * w
        along_mean = dnormed.mean(axis=1, keepdims=True)
        along_normed = (dnormed * normed).mean(axis=1, keepdims=True)
        through = rstd[:, None] * (dnormed - along_mean - normed * along_normed)
        dx[...] = through if dres is None else dres + through

    def linear_forward(self, y: Float64, x: Float64, w: Float64, b: Float64 | None) -> None:
        y[...] = x @ w.T if b is None else x @ w.T + b

    def linear_backward(
        self, dx: Float64 | None, dw: Float64, db: Float64 | None, dy: Float64, x: Float64, w: Float64, acc: bool
    ) -> None:
        if dx is not None:
            dx[...] = dy @ w
        store(dw, dy.T @ x, acc)
        if db is not None:
            store(db, dy.sum(axis=0), acc)

    def linear_gelu_forward(self, act: Float64, pre: Float64, x: Float64, w: Float64, b: Float64) -> None:
        pre[...] = x @ w.T + b
        self.gelu_forward(act, pre)

    def gelu_forward(self, act: Float64, pre: Float64) -> None:
        act[...] = gelu(pre)

    def gelu_linear_backward(
        self, dpre: Float64, dw: Float64, db: Float64, dy: Float64, act: Float64, pre: Float64, w: Float64, acc: bool
    ) -> None:
        store(dw, dy.T @ act, acc)
        store(db, dy.sum(axis=0), acc)
        dpre[...] = (dy @ w) * gelu_derivative(pre)

    def attention_forward(self, out: Float64, lse: Float64, qkv: Float64, num_heads: int) -> None:
        B, T, C = out.shape
        q, k, v = np.split(qkv.reshape(B, T, 3 * num_heads, C // num_heads), 3, axis=2)  # each (B, T, NH, HS)
        heads = out.reshape(B, T, num_heads, C // num_heads)
        for b in range(B):
            for h in range(num_heads):
                probabilities, lse[b, h] = causal_probabilities(q[b, :, h], k[b, :, h])
                heads[b, :, h] = probabilities @ v[b, :, h]

    def attention_backward(
        self, dqkv: Float64, dout: Float64, out: Float64, lse: Float64, qkv: Float64, num_heads: int
    ) -> None:
        B, T, C = out.shape
        size = C // num_heads  # HS
        q, k, v = np.split(qkv.reshape(B, T, 3 * num_heads, size), 3, axis=2)
        dq, dk, dv = np.split(dqkv.reshape(B, T, 3 * num_heads, size), 3, axis=2)
        dheads = dout.reshape(B, T, num_heads, size)
        for b in range(B):
            for h in range(num_heads):
                probabilities, _ = causal_probabilities(q[b, :, h], k[b, :, h])
                dprobabilities = dheads[b, :, h] @ v[b, :, h].T  # (T, T)
                mean = (dprobabilities * probabilities).sum(axis=1, keepdims=True)
                dscores = probabilities * (dprobabilities - mean) / np.sqrt(size)
                dq[b, :, h], dk[b, :, h], dv[b, :, h] = (
                    dscores @ k[b, :, h], dscores.T @ q[b, :, h], probabilities.T @ dheads[b, :, h]
                )  # fmt: skip

    def attention_cached(
        self, out: Float64, keys: Float64, values: Float64, qkv: Float64, lengths: Int32, num_heads: int
    ) -> None:
        S, T, C = out.shape
        q, k, v = np.split(qkv.reshape(S, T, 3 * num_heads, C // num_heads), 3, axis=2)
        heads = out.reshape(S, T, num_heads, C // num_heads)
        for s in range(S):
            start = int(lengths[s])
            for h in range(num_heads):
                keys[s, h, start : start + T] = k[s, :, h]
                values[s, h, start : start + T] = v[s, :, h]
                probabilities, _ = causal_probabilities(q[s, :, h], keys[s, h, : start + T], start)
                heads[s, :, h] = probabilities @ values[s, h, : start + T]

    def head_loss(
        self, losses: Float64, dx: Float64 | None, dw: Float64 | None,
        x: Float64, w: Float64, targets: Int32, vocab_size: int, dloss: float, acc: bool,
    ) -> None:  # fmt: skip
        counted = targets >= 0
        rows = np.arange(targets.size)
        logits = x @ w[:vocab_size].T  # (N, V)
        logits -= logits.max(axis=1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses[...] = np.where(counted, -log_probabilities[rows, targets], 0.0)
        if dx is None or dw is None:
            return
        dlogits = np.exp(log_probabilities)
        dlogits[rows, targets] -= 1.0
        dlogits *= dloss * counted[:, None]
        dx[...] = dlogits @ w[:vocab_size]
        if not acc:
            dw[...] = 0.0
        dw[:vocab_size] += dlogits.T @ x

    def head_logits(self, logits: Float64, x: Float64, w: Float64) -> None:
        logits[...] = x @ w[: logits.shape[1]].T

    def sum_squares(self, out: Float64, g: Float64) -> None:
        out[0] = np.dot(g, g)

    def adamw(
        self, master: Float64, m: Float64, v: Float64, g: Float64,
        segments: NDArray[np.int64], hyper: Float64, sumsq: Float64,
    ) -> None:  # fmt: skip
        lr, beta1, beta2, eps, decay, correction1, correction2, max_norm = hyper
        if max_norm > 0.0:
            g = g * min(1.0, max_norm / np.sqrt(sumsq[0])) if sumsq[0] > 0.0 else g
        m[...] = beta1 * m + (1.0 - beta1) * g
        v[...] = beta2 * v + (1.0 - beta2) * g**2
        update = (m / correction1) / (np.sqrt(v / correction2) + eps)
        for offset, length, decayed in segments:
            part = slice(offset, offset + length)
            master[part] -= lr * (update[part] + decay * decayed * master[part])


REFERENCE = ReferenceKernels()
