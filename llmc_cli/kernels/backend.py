"""Open the backend for --device, --precision and --threads.

An option that this machine cannot satisfy is an error; there is no silent fallback.
"""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.kernels.spec import Kernels
from llmc_cli.machine.cores import available_cores, default_threads, processor_name
from llmc_cli.machine.memory import installed_memory

PRECISIONS = ("auto", "fp32", "bf16", "bf16x3", "tf32")
MATMULS = ("auto", "tiles", "blas")
PARTS = {"bf16": 1, "bf16x3": 2, "fp32": 3}
"""Number of bf16 parts that each float32 is split into on AMX tiles."""
SAMPLING_PRECISIONS = ("auto", "fp32", "bf16", "int8")


@dataclass(frozen=True)
class Backend:
    """Open kernels and a description of what they run on."""

    kernels: Kernels
    device: str  # "cpu", "cuda:0"
    precision: str  # "fp32"
    threads: int
    description: str  # processor, threads, BLAS
    reason: str  # what "auto" resolved to and why; empty if nothing was "auto"
    memory: int | None = None  # bytes available to arrays, if known


def open_kernels(
    device: str,
    precision: str,
    threads: int | None,
    on_compile: Callable[[str], None] | None = None,
    training: bool = False,
) -> Backend:
    """Return the backend for these options; ``threads`` None uses the cores available to this process.

    Precision "auto" is fp32, or with ``training`` bf16 if the device multiplies it natively. The environment variable
    ``LLMC_MATMUL`` selects the matrix multiplication on the CPU: "tiles" (AMX), "blas", or "auto", which uses tiles
    where available, except that fp32 uses the faster of the two as measured once on an idle machine.

    ``on_compile`` is called with a message before kernels are compiled. Raises UsageError for an unknown name and
    MissingError for what this machine or installation lacks.
    """
    if precision == "int8":
        raise UsageError("--precision int8: supported by llmc sample and llmc bench sample only")
    _check(device, precision, threads, PRECISIONS)
    index, reasons = _resolve_device(device)
    if index is not None:
        return _open_cuda(index, precision, training, reasons)
    if precision == "tf32":
        raise MissingError("--precision tf32: supported on GPUs only; use --precision fp32, bf16x3 or bf16")
    choice = os.environ.get("LLMC_MATMUL", "auto")
    if choice not in MATMULS:
        raise UsageError(f"LLMC_MATMUL={choice}: expected one of {', '.join(MATMULS)}")
    threads = threads or default_threads()
    _allow_threads(threads)
    tiles = choice != "blas" and _has_tiles()
    if choice == "tiles" and not tiles:
        raise MissingError("LLMC_MATMUL=tiles: this processor has no AMX tiles, or the system does not allow them")
    if precision == "auto":
        precision = _auto_precision(training, tiles, reasons)
    if precision == "bf16x3" and not tiles:
        raise MissingError("--precision bf16x3: requires AMX tiles; use --precision fp32 or bf16")
    return _open_cpu(precision, threads, tiles, choice == "auto", reasons, on_compile)


def open_sampling(
    device: str, precision: str, threads: int | None, on_compile: Callable[[str], None] | None = None
) -> Backend:
    """Return the backend for sampling one token at a time; as ``open_kernels``.

    ``precision`` is that in which the weights are stored; "auto" is fp32.
    """
    _check(device, precision, threads, SAMPLING_PRECISIONS)
    index, reasons = _resolve_device(device)
    if index is not None:
        return _open_cuda(index, precision, False, reasons)
    if precision == "auto":
        precision = _auto_precision(False, False, reasons)
    threads = threads or available_cores()
    _allow_threads(threads)
    from llmc_cli.kernels.cpu import loading

    kernels = loading.load(loading.SAMPLING, on_compile).SamplingKernels(threads, precision)
    description = _describe(threads, kernels.products_name())
    return Backend(kernels, "cpu", precision, threads, description, "; ".join(reasons), installed_memory())


def sampling_precisions(device: str, precision: str) -> tuple[str, ...]:
    """Return the precisions that ``bench sample`` measures.

    This is ``precision`` if sampling supports it, otherwise (also for "auto") all that the device supports.
    """
    known = SAMPLING_PRECISIONS[1:]
    if precision in known:
        return (precision,)
    index, _ = _resolve_device(device)
    if index is None:
        return known
    from llmc_cli.kernels.cuda.device import TENSOR_CORES, find

    return ("fp32", "bf16") if find(index)[1] >= TENSOR_CORES else ("fp32",)


def _check(device: str, precision: str, threads: int | None, precisions: tuple[str, ...]) -> None:
    """Raise UsageError for an unknown device or precision, or fewer than 1 thread."""
    if device not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if precision not in precisions:
        raise UsageError(f"--precision {precision}: expected one of {', '.join(precisions)}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: expected at least 1")


def _resolve_device(device: str) -> tuple[int | None, list[str]]:
    """Return the index of the CUDA device, or None for the CPU, and the reason if ``device`` is "auto".

    Raises MissingError if a CUDA device is requested and unavailable.
    """
    if device == "cpu":
        return None, []
    from llmc_cli.kernels.cuda.device import find

    if device != "auto":
        index = int(device.partition(":")[2] or 0)
        find(index)
        return index, []
    try:
        name, _ = find(0)
    except MissingError as error:
        return None, [f"cpu: {str(error).removeprefix('--device cuda: ').partition(';')[0]}"]
    return 0, [f"cuda: found {name}"]


def _auto_precision(training: bool, native_bf16: bool, reasons: list[str]) -> str:
    """Return the precision for "auto" and append the reason."""
    precision = "bf16" if training and native_bf16 else "fp32"
    if training:
        reasons.append(f"{precision}: bf16 is {'' if native_bf16 else 'not '}multiplied natively here")
    else:
        reasons.append("fp32: the default")
    return precision


def _open_cuda(index: int, precision: str, training: bool, reasons: list[str]) -> Backend:
    """Return kernels on a CUDA device. Raises MissingError for a precision that it does not support."""
    from llmc_cli.kernels.cuda.device import TENSOR_CORES, Device, find

    name, capability = find(index)
    tensor_cores = capability >= TENSOR_CORES
    if precision == "auto":
        precision = _auto_precision(training, tensor_cores, reasons)
    if precision in ("bf16x3", "int8"):
        raise MissingError(f"--precision {precision}: supported on the CPU only; use --precision fp32 or bf16")
    if precision in ("tf32", "bf16") and not tensor_cores:
        raise MissingError(
            f"--precision {precision}: requires compute capability {TENSOR_CORES / 10}; {name} has "
            f"{capability / 10}; use --precision fp32"
        )
    from llmc_cli.kernels.cuda.kernels import CudaKernels

    opened = Device(index, precision == "bf16")
    description = f"{name}, compute capability {capability / 10}, {precision} by cuBLAS"
    kernels = CudaKernels(opened, precision)
    return Backend(kernels, f"cuda:{index}", precision, 1, description, "; ".join(reasons), opened.free_bytes())


def _has_tiles() -> bool:
    from llmc_cli.kernels.cpu.amx.intrinsics import available

    return available()


def _open_cpu(
    precision: str,
    threads: int,
    tiles: bool,
    may_choose_blas: bool,
    reasons: list[str],
    on_compile: Callable[[str], None] | None,
) -> Backend:
    """Return kernels on the CPU.

    With ``may_choose_blas``, float32 is multiplied by BLAS despite ``tiles`` if that has been measured to be faster.
    """
    from llmc_cli.kernels.cpu import loading

    kernels_class = loading.load(loading.KERNELS, on_compile).CpuKernels
    matmul = attention = None
    if tiles:
        parts = PARTS[precision]
        matmul = loading.load(loading.tile_matmul(parts), on_compile).TileMatmul(parts)
        attention = loading.load(loading.TILE_ATTENTION, on_compile) if precision == "bf16" else None
    elif precision == "bf16":
        matmul = loading.load(loading.ROUNDED_MATMUL, on_compile).RoundedMatmul()
    kernels = kernels_class(threads, matmul, attention, on_compile)
    products = kernels.matmul.name
    if tiles and may_choose_blas and precision == "fp32":
        from llmc_cli.kernels.cpu.matmul_choice import speedup_over_blas

        speedup = speedup_over_blas(kernels.matmul, threads)
        if speedup is not None:
            if speedup < 1.0:
                kernels = kernels_class(threads, None, None, on_compile)
            products = f"{kernels.matmul.name} ({products} measured {speedup:.2f} times as fast as BLAS)"
    description = _describe(threads, products)
    return Backend(kernels, "cpu", precision, threads, description, "; ".join(reasons), installed_memory())


def _describe(threads: int, products: str) -> str:
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}, {products}"


def _allow_threads(threads: int) -> None:
    """Import numba with a thread pool of at least ``threads``.

    The pool has one thread per core unless NUMBA_NUM_THREADS says otherwise on import. For more threads than cores the
    variable is set, and stays set because numba reads it again later. Raises MissingError if numba has already been
    imported with fewer threads.
    """
    if threads > available_cores() and "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
    import numba

    limit: int = vars(numba.config)["NUMBA_NUM_THREADS"]
    if threads > limit:
        raise MissingError(
            f"--threads {threads}: numba was imported with a limit of {limit} threads; "
            f"set NUMBA_NUM_THREADS={threads} in the environment"
        )
