"""Random number generators with the same output as PyTorch's CPU generator and as llm.c's."""

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

BLOCK = 16  # the vectorized path of PyTorch's CPU kernel generates 16 normals at a time
CHUNK = BLOCK << 12  # elements per task: bounds the scratch memory, so that it fits in the CPU cache


class MersenneTwister:
    """mt19937 (Matsumoto and Nishimura 1998), seeded as PyTorch and NumPy's RandomState seed it."""

    drawn: bool

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._bits = np.random.MT19937()
        self._generator = np.random.Generator(self._bits)
        _, words, *_ = np.random.RandomState(seed).get_state()
        self.state = np.asarray(words, np.uint32), 0

    def words(self, n: int) -> NDArray[np.uint32]:
        """Return the next n 32-bit words."""
        self.drawn = self.drawn or n > 0
        # Over the full range, each value is one output of the generator.
        return self._generator.integers(0, 1 << 32, n, np.uint32)

    def fill_normal(self, out: NDArray[np.floating], std: float, threads: int = 1) -> None:
        """Fill a flat array with normals of mean 0, as ``torch.Tensor.normal_`` does for 16 elements or more.

        For fewer elements, which PyTorch generates differently, this takes the first of 16 normals. Words are drawn in
        order by this thread, while other threads transform them into normals.
        """
        if out.size < BLOCK:
            first = np.empty(BLOCK, out.dtype)
            _box_muller(first, self.words(BLOCK), std)
            out[:] = first[: out.size]
            return
        whole = out.size // BLOCK * BLOCK
        pending: deque[Future[None]] = deque()
        with ThreadPoolExecutor(max(1, threads - 1)) as pool:
            for start in range(0, whole, CHUNK):
                stop = min(start + CHUNK, whole)
                pending.append(pool.submit(_box_muller, out[start:stop], self.words(stop - start), std))
                if len(pending) == threads:
                    pending.popleft().result()
        for each in pending:
            each.result()
        if whole < out.size:
            self.words(out.size - whole)
            _box_muller(out[-BLOCK:], self.words(BLOCK), std)

    def permute(self, order: NDArray[np.int32]) -> None:
        """Shuffle in place: for i = n-1 … 1, swap elements i and word % (i+1)."""
        n = order.size
        partners = self.words(max(n - 1, 0)) % np.arange(n, 1, -1, dtype=np.uint32)
        values = order.tolist()
        for i, j in zip(range(n - 1, 0, -1), partners.tolist(), strict=True):
            values[i], values[j] = values[j], values[i]
        order[:] = values

    @property
    def state(self) -> tuple[NDArray[np.uint32], int]:
        """The 624 words and how many of them have been drawn: 0 only if no word was ever drawn."""
        state = self._bits.state["state"]
        return np.asarray(state["key"], np.uint32), state["pos"] if self.drawn else 0

    @state.setter
    def state(self, value: tuple[NDArray[np.uint32], int]) -> None:
        key, position = value
        self.drawn = position > 0
        # NumPy represents a newly seeded generator by position 624: the first words are not generated yet
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position or 624}}


def _box_muller(out: NDArray[np.floating], words: NDArray[np.uint32], std: float) -> None:
    """Transform words into as many normals, in pairs (i, i+8) of each block of 16 (Box and Muller 1958)."""
    uniforms = (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)  # in [0, 1), 24 bits each
    u = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0] + np.float32(1e-12)))
    angle = np.float32(2 * math.pi) * u[:, 1]
    pairs = out.reshape(-1, 2, BLOCK // 2)
    pairs[:, 0] = radius * np.cos(angle) * np.float32(std)
    pairs[:, 1] = radius * np.sin(angle) * np.float32(std)


class Xorshift:
    """xorshift64* (Vigna 2016, arXiv:1402.6246), llm.c's generator for sampling."""

    MASK = (1 << 64) - 1

    def __init__(self, seed: int) -> None:
        self.state = seed

    def word(self) -> int:
        """Return the next 32 bits."""
        s = self.state
        s ^= s >> 12
        s ^= (s << 25) & self.MASK
        s ^= s >> 27
        self.state = s
        return ((s * 0x2545F4914F6CDD1D) & self.MASK) >> 32

    def uniform(self) -> float:
        """Return a float32 in [0, 1) with 24 random bits."""
        return (self.word() >> 8) / 16777216.0
