"""Random numbers that equal those of PyTorch's CPU generator and of the C trainer, draw for draw."""

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

BLOCK = 16  # PyTorch makes normals sixteen at a time: the vector path of its CPU kernel
CHUNK = BLOCK << 12  # elements made at once: bounds the scratch memory, and keeps it in the cache


class MersenneTwister:
    """mt19937 (Matsumoto and Nishimura 1998), seeded as PyTorch and NumPy's RandomState seed it."""

    drawn: bool

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._bits = np.random.MT19937()
        self._drawing = np.random.Generator(self._bits)
        _, words, *_ = np.random.RandomState(seed).get_state()
        self.state = np.asarray(words, np.uint32), 0

    def words(self, n: int) -> NDArray[np.uint32]:
        """The next n 32-bit words."""
        self.drawn = self.drawn or n > 0
        return self._drawing.integers(0, 1 << 32, n, np.uint32)  # of the whole range: each is the generator's own

    def fill_normal(self, out: NDArray[np.floating], std: float, threads: int = 1) -> None:
        """Fill a flat array with normals of mean 0, as ``torch.Tensor.normal_`` does for 16 elements or more.

        (Below 16 PyTorch goes another way; here the first of sixteen are taken.) Words are drawn in order, while other
        threads make normals of those before.
        """
        if out.size < BLOCK:
            first = np.empty(BLOCK, out.dtype)
            _box_muller(first, self.words(BLOCK), std)
            out[:] = first[: out.size]
            return
        whole = out.size // BLOCK * BLOCK
        making: deque[Future[None]] = deque()
        with ThreadPoolExecutor(max(1, threads - 1)) as pool:
            for start in range(0, whole, CHUNK):
                stop = min(start + CHUNK, whole)
                making.append(pool.submit(_box_muller, out[start:stop], self.words(stop - start), std))
                if len(making) == threads:
                    making.popleft().result()
        for each in making:
            each.result()
        if whole < out.size:
            self.words(out.size - whole)
            _box_muller(out[-BLOCK:], self.words(BLOCK), std)

    def permute(self, order: NDArray[np.int32]) -> None:
        """Shuffle in place: for i = n-1 … 1, swap i with word % (i+1)."""
        n = order.size
        partners = self.words(max(n - 1, 0)) % np.arange(n, 1, -1, dtype=np.uint32)
        values = order.tolist()
        for i, j in zip(range(n - 1, 0, -1), partners.tolist(), strict=True):
            values[i], values[j] = values[j], values[i]
        order[:] = values

    @property
    def state(self) -> tuple[NDArray[np.uint32], int]:
        """The 624 words and how many of them are drawn: 0 only where none ever was."""
        state = self._bits.state["state"]
        return np.asarray(state["key"], np.uint32), state["pos"] if self.drawn else 0

    @state.setter
    def state(self, value: tuple[NDArray[np.uint32], int]) -> None:
        key, position = value
        self.drawn = position > 0
        # a freshly seeded generator has its first 624 words still to make: NumPy says so by position 624
        self._bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": position or 624}}


def _box_muller(out: NDArray[np.floating], words: NDArray[np.uint32], std: float) -> None:
    """Fill ``out`` with normals of as many words, pairs (i, i+8) within each sixteen (Box and Muller 1958)."""
    uniforms = (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)  # in [0, 1), 24 bits each
    u = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - u[:, 0] + np.float32(1e-12)))
    angle = np.float32(2 * math.pi) * u[:, 1]
    pairs = out.reshape(-1, 2, BLOCK // 2)
    pairs[:, 0] = radius * np.cos(angle) * np.float32(std)
    pairs[:, 1] = radius * np.sin(angle) * np.float32(std)


class Xorshift:
    """xorshift64* (Vigna 2016, arXiv:1402.6246), the C trainer's small generator."""

    MASK = (1 << 64) - 1

    def __init__(self, seed: int) -> None:
        self.state = seed

    def word(self) -> int:
        """The next 32 bits."""
        s = self.state
        s ^= s >> 12
        s ^= (s << 25) & self.MASK
        s ^= s >> 27
        self.state = s
        return ((s * 0x2545F4914F6CDD1D) & self.MASK) >> 32

    def uniform(self) -> float:
        """A float32 in [0, 1), 24 bits."""
        return (self.word() >> 8) / 16777216.0
