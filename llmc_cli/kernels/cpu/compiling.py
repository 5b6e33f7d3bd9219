"""How every kernel of this folder is compiled.

A kernel is a function over whole arrays with one signature, compiled when its module is imported and kept in the cache
that ``cache.load_kernels`` chose before. A helper is inlined into kernels and compiled with them.

Kernels are parallel over outputs and split their work in pieces whose size does not depend on the number of threads, so
that the same inputs give the same bits. Of fast mathematics only those parts are allowed that keep NaN and infinity:
``REORDER`` lets sums be vectorized, ``CONTRACT`` makes fused multiply-adds. (Reordering products can overflow: where
exponentials are multiplied it is CONTRACT.)

LLVM vectorizes loops that count from 0 over whole arrays. One from ``start`` to ``stop`` it often does not, since
numba's indices may be negative: such loops stand in a helper that gets slices.
"""

from collections.abc import Callable
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
"""What only processors have on which vectors of 512 bits are worth their clock rate. LLVM prefers 256 on them, too."""

_settings: Any = numba.config  # made of the environment, so no type checker knows what is in it
if _settings.CPU_FEATURES is None and WIDE_VECTORS in (features := get_host_cpu_features()).split(","):
    # read when the first kernel of the process is compiled; later it has no effect
    _settings.CPU_FEATURES = f"{features},-prefer-256-bit"

caching = True
"""Whether kernels compiled from now on are kept on disk; ``cache.load_kernels`` sets it."""


def target() -> tuple[str, str, str]:
    """What numba compiles for: LLVM's triple, the processor's name, its features as ``+avx2,-avx512f,…``."""
    triple, name, features = cpu_target.target_context.codegen().magic_tuple()
    return triple, name, features


def kernel(*arguments: Any, fastmath: set[str], parallel: bool = True) -> Decorator:
    """Compile the decorated function for exactly these argument types; without ``parallel``, prange is a plain range:
    for calls so short that waking the threads would take longer."""
    decorator: Decorator = njit(
        void(*arguments), parallel=parallel, cache=caching, fastmath=fastmath, error_model="numpy", boundscheck=False
    )
    return decorator


def specialized(function: Callable[..., Any]) -> Any:
    """Compile the decorated function for the argument types of each call, when the first such call is made."""
    return njit(function, parallel=True, cache=caching, fastmath=CONTRACT, error_model="numpy", boundscheck=False)


def helper(fastmath: set[str], inline: bool = True) -> Decorator:
    """Compile the decorated function as part of the kernels that call it."""
    decorator: Decorator = njit(fastmath=fastmath, error_model="numpy", boundscheck=False, forceinline=inline)
    return decorator
