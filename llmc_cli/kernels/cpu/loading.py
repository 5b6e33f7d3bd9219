"""Load the groups of compiled kernels."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmc_cli.kernels.cpu.kernels import CpuKernels
    from llmc_cli.kernels.cpu.matmul import Matmul
    from llmc_cli.kernels.cpu.sampling import DecodingKernels
from llmc_cli.kernels.cpu.compile_cache import (
    ATTENTION,
    CACHED_ATTENTION,
    DECODING,
    KERNELS,
    ROUNDED,
    TILE_ATTENTION,
    TILES,
    _load,
)


def load_kernels(on_compile: Callable[[str], None] | None = None) -> "type[CpuKernels]":
    """The class of the CPU's kernels, compiled or loaded from the cache.

    Before a wait for the compiler, or for another process that is compiling, ``on_compile`` is told what is coming.
    Where the cache cannot be written the kernels are compiled for this process only.
    """
    _load(KERNELS, on_compile, "compiling kernels, once, about 10 s")
    loaded: type[CpuKernels] = importlib.import_module(KERNELS).CpuKernels
    return loaded


def load_decoding(on_compile: Callable[[str], None] | None = None) -> "type[DecodingKernels]":
    """The class of the CPU's kernels for sampling; as ``load_kernels``."""
    load_kernels(on_compile)
    load_cached_attention(on_compile)
    _load(DECODING, on_compile, "compiling kernels for sampling, once, about 10 s")
    loaded: type[DecodingKernels] = importlib.import_module(DECODING).DecodingKernels
    return loaded


def load_tiles(parts: int, on_compile: Callable[[str], None] | None = None) -> "Matmul":
    """Products on AMX tiles, of numbers in this many parts; as ``load_kernels``."""
    _load(TILES, on_compile, "compiling matrix products, once, about 6 s", parts)
    made: Matmul = importlib.import_module(TILES).TileMatmul(parts)
    return made


def load_attention(on_compile: Callable[[str], None] | None = None) -> ModuleType:
    """Attention in float32; as ``load_kernels``."""
    _load(ATTENTION, on_compile, "compiling attention, once, about 8 s")
    return importlib.import_module(ATTENTION)


def load_cached_attention(on_compile: Callable[[str], None] | None = None) -> ModuleType:
    """Attention of new tokens to what is cached, in float32; as ``load_kernels``."""
    _load(CACHED_ATTENTION, on_compile, "compiling attention for sampling, once, about 4 s")
    return importlib.import_module(CACHED_ATTENTION)


def load_tile_attention(on_compile: Callable[[str], None] | None = None) -> ModuleType:
    """Attention on AMX tiles, once ``load_tiles`` has succeeded; as ``load_kernels``."""
    _load(TILE_ATTENTION, on_compile, "compiling attention on tiles, once, about 10 s")
    return importlib.import_module(TILE_ATTENTION)


def load_rounded(on_compile: Callable[[str], None] | None = None) -> "Matmul":
    """Products of numbers rounded to bf16, by BLAS; as ``load_kernels``."""
    _load(ROUNDED, on_compile, "compiling the rounding to bf16, once, about 2 s")
    made: Matmul = importlib.import_module(ROUNDED).RoundedMatmul()
    return made
