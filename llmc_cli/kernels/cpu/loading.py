"""Load and compile the groups of CPU kernels. Each is compiled, or loaded from the cache, when it is first needed."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from llmc_cli.kernels.cpu import compile_cache

_PACKAGE = "llmc_cli.kernels.cpu"


class Group(NamedTuple):
    """Kernels that are compiled together."""

    module: str  # importing it registers the kernels
    marker: str  # file in the cache folder
    message: str  # for ``on_compile``
    requires: tuple["Group", ...] = ()  # groups whose kernels the module uses
    parts: int = 0  # of ``tile_matmul`` only


KERNELS = Group(f"{_PACKAGE}.kernels", "complete", "compiling kernels (first use only, about 10 s)")
ATTENTION = Group(f"{_PACKAGE}.attention", "complete-attention", "compiling attention (first use only, about 8 s)")
CACHED_ATTENTION = Group(
    f"{_PACKAGE}.cached_attention",
    "complete-cached-attention",
    "compiling attention for sampling (first use only, about 4 s)",
)
SAMPLING = Group(
    f"{_PACKAGE}.sampling", "complete-sampling", "compiling kernels for sampling (first use only, about 10 s)",
    (KERNELS, CACHED_ATTENTION),
)  # fmt: skip
ROUNDED_MATMUL = Group(
    f"{_PACKAGE}.rounded_matmul", "complete-rounded-matmul",
    "compiling the rounding to bf16 (first use only, about 2 s)", (KERNELS,),
)  # fmt: skip
TILE_ATTENTION = Group(
    f"{_PACKAGE}.amx.attention", "complete-tile-attention", "compiling attention on tiles (first use only, about 10 s)"
)


def tile_matmul(parts: int) -> Group:
    """Return the group of matrix products on AMX tiles with float32 split into this many bf16 parts."""
    marker, message = f"complete-tile-matmul-{parts}", "compiling matrix products (first use only, about 6 s)"
    return Group(f"{_PACKAGE}.amx.matmul", marker, message, (KERNELS,), parts)


_loaded: set[Group] = set()


def load(group: Group, on_compile: Callable[[str], None] | None = None) -> ModuleType:
    """Make a group of kernels callable, and return its module.

    ``on_compile`` receives a message before a wait for the compiler, or for another process that is compiling.
    """
    for required in group.requires:
        load(required, on_compile)
    if group in _loaded:
        return importlib.import_module(group.module)
    if on_compile is not None and not compile_cache.is_complete(group.marker):
        on_compile(group.message)
    module = importlib.import_module(group.module)
    if group.parts:
        module.register_product(group.parts)
    compile_cache.compile_kernels(group.marker)
    _loaded.add(group)
    return module
