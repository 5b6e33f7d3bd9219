"""Decorators for the CPU kernels, and their compilation.

A kernel is a function over whole arrays with fixed argument types. Its decorator only registers it;
``compile_registered`` compiles it, with or without an on-disk cache. A helper is a function that kernels call; it is
compiled with them.

Kernels are parallel over outputs and divide their work into pieces whose size does not depend on the number of threads,
so the same inputs give the same bits. Only those fast-math flags are used that preserve NaN and infinity: ``REORDER``
allows sums to be vectorized, ``CONTRACT`` only allows fused multiply-adds. Reordered products can overflow, so code
that multiplies exponentials uses ``CONTRACT``.

LLVM vectorizes loops that run from 0 over a whole array. It often fails on loops from ``start`` to ``stop``, because
numba's indices may be negative; such loops are moved into a helper that receives slices.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core import types
from numba.core.codegen import get_host_cpu_features
from numba.core.registry import cpu_target

Decorator = Callable[[Callable[..., Any]], Any]

CONTRACT = {"contract"}
REORDER = {"contract", "reassoc", "nsz", "arcp"}

void, boolean, int64, float32, float64 = types.void, types.boolean, types.int64, types.float32, types.float64
ubytes1 = types.uint8[::1]
# C-contiguous arrays by element type and number of dimensions: float2 is a float32 matrix, not CUDA's vector type
float1 = types.float32[::1]
float2 = types.float32[:, ::1]
double1 = types.float64[::1]
int1 = types.int32[::1]
int2 = types.int32[:, ::1]
long2 = types.int64[:, ::1]
uint1 = types.uint32[::1]
bytes3 = types.int8[:, :, ::1]
ubytes2 = types.uint8[:, ::1]
uint2 = types.uint32[:, ::1]

WIDE_VECTORS = "+avx512fp16"
"""A feature of those processors on which 512-bit vectors do not lower the clock rate much. LLVM prefers 256 bits there,
too."""

_settings: Any = numba.config  # its attributes are created at run time, so type checkers do not know them
if _settings.CPU_FEATURES is None and WIDE_VECTORS in (features := get_host_cpu_features()).split(","):
    # numba reads this setting once, when it compiles the first kernel of the process
    _settings.CPU_FEATURES = f"{features},-prefer-256-bit"

_registered: list[tuple[Any, Any]] = []
"""Dispatchers and signatures that ``compile_registered`` has not compiled yet."""


def target() -> tuple[str, str, str]:
    """Return numba's compilation target: LLVM triple, processor name, and features as ``+avx2,-avx512f,...``."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, features


def kernel(*arguments: Any, fastmath: set[str], parallel: bool = True) -> Decorator:
    """Register the decorated function as a kernel with these argument types.

    With ``parallel=False``, prange is range: for calls so short that waking the threads would take longer.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher = njit(parallel=parallel, fastmath=fastmath, error_model="numpy", boundscheck=False)(function)
        register(dispatcher, *arguments)
        return dispatcher

    return decorate


def specialized(function: Callable[..., Any]) -> Any:
    """Return a kernel that can have several signatures; pass the argument types of each to ``register``."""
    return njit(function, parallel=True, fastmath=CONTRACT, error_model="numpy", boundscheck=False)


def helper(fastmath: set[str], inline: bool = True) -> Decorator:
    """Compile the decorated function as part of the kernels that call it."""
    decorator: Decorator = njit(fastmath=fastmath, error_model="numpy", boundscheck=False, forceinline=inline)
    return decorator


def register(dispatcher: Any, *arguments: Any) -> None:
    """Let the next ``compile_registered`` compile ``dispatcher`` for these argument types."""
    _registered.append((dispatcher, void(*arguments)))


def compile_registered(cache: Path | None) -> None:
    """Compile the registered kernels, or load them from numba's cache in the folder ``cache``; None: use no cache.

    Raises OSError if the folder cannot be used. The kernels stay registered then, for a call without a cache.
    """
    for dispatcher, signature in _registered:
        if cache is None:
            dispatcher._cache.disable()  # a cache that failed; numba has no public way to remove it
        else:
            _enable_cache(dispatcher, cache)
        if dispatcher.signatures:
            dispatcher.disable_compile(False)
        dispatcher.compile(signature)
        dispatcher.disable_compile()  # calls with other types raise TypeError
    _registered.clear()


def _enable_cache(dispatcher: Any, folder: Path) -> None:
    """Enable numba's cache for one dispatcher. Numba reads the folder from a global setting, which is restored."""
    previous = _settings.CACHE_DIR
    _settings.CACHE_DIR = str(folder)
    try:
        dispatcher.enable_caching()
    except RuntimeError as error:  # no folder is writable
        raise OSError(f"{folder}: {error}") from error
    finally:
        _settings.CACHE_DIR = previous
    if not Path(dispatcher.stats.cache_path).is_relative_to(folder):  # numba falls back to folders of its own
        raise OSError(f"{folder}: numba cannot write to it")
