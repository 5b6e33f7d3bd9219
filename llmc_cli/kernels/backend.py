"""--device, --precision and --threads become a backend. What cannot be had is an error; nothing falls back silently."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from llmc_cli.errors import MissingError, UsageError
from llmc_cli.kernels.spec import Kernels
from llmc_cli.machine.cores import available_cores, processor_name, usual_threads
from llmc_cli.machine.memory import installed_memory

PRECISIONS = ("auto", "fp32", "bf16", "bf16x3", "tf32")
MATMULS = ("auto", "tiles", "blas")
PARTS = {"bf16": 1, "bf16x3": 2, "fp32": 3}
"""On AMX tiles: bf16 parts that a number is split into."""
SAMPLING_PRECISIONS = ("auto", "fp32", "bf16", "int8")


@dataclass(frozen=True)
class Backend:
    """Kernels ready to run, and what they run on in words."""

    kernels: Kernels
    device: str  # "cpu", or "cuda:0"
    precision: str  # "fp32"
    threads: int
    description: str  # processor, threads, BLAS
    why: str  # what "auto" chose and for what reason; empty where nothing was left to choose
    memory: int | None = None  # bytes that arrays can take, where that is known


def open_kernels(
    device: str,
    precision: str,
    threads: int | None,
    on_compile: Callable[[str], None] | None = None,
    training: bool = False,
) -> Backend:
    """The backend for these options; ``threads`` None takes the cores that this process may use.

    Precision "auto" is fp32, but for ``training`` bf16 where the device multiplies it natively. The environment's
    ``LLMC_MATMUL`` chooses what multiplies matrices on the CPU: "tiles", "blas", or "auto": tiles where there are any,
    for fp32 whichever was faster in a measurement made once, when the machine is idle.
    ``on_compile`` is told before a wait for the compiler. Raises UsageError for a name that is none, MissingError for
    what this machine or version has not.
    """
    if precision == "int8":
        raise UsageError("--precision int8: for llmc sample and llmc bench sample only, where weights may be so coarse")
    _check(device, precision, threads, PRECISIONS)
    index, why = _place(device)
    if index is not None:
        return _open_cuda(index, precision, training, why)
    if precision == "tf32":
        raise MissingError("--precision tf32: a precision of GPUs; use --precision fp32, bf16x3 or bf16")
    chosen = os.environ.get("LLMC_MATMUL", "auto")
    if chosen not in MATMULS:
        raise UsageError(f"LLMC_MATMUL={chosen}: expected one of {', '.join(MATMULS)}")
    threads = threads or usual_threads()
    _allow_threads(threads)
    tiles = chosen != "blas" and _has_tiles()
    if chosen == "tiles" and not tiles:
        raise MissingError("LLMC_MATMUL=tiles: this processor has no AMX tiles, or the system does not allow them")
    if precision == "auto":
        precision = "bf16" if training and tiles else "fp32"
        native = "multiplied" if tiles else "not multiplied"
        why.append(f"{precision}: bf16 is {native} natively here" if training else "fp32: unless another is asked for")
    if precision == "bf16x3" and not tiles:
        raise MissingError("--precision bf16x3: needs AMX tiles, which are not there; use --precision fp32 or bf16")
    return _open_cpu(precision, threads, tiles, chosen == "auto", why, on_compile)


def open_sampling(
    device: str, precision: str, threads: int | None, on_compile: Callable[[str], None] | None = None
) -> Backend:
    """As ``open_kernels``, for sampling: a token at a time, the weights in ``precision``, of which "auto" is fp32."""
    _check(device, precision, threads, SAMPLING_PRECISIONS)
    index, why = _place(device)
    if index is not None:
        return _open_cuda(index, precision, False, why)
    if precision == "auto":
        precision = "fp32"
        why.append("fp32: the model as it is")
    threads = threads or available_cores()
    _allow_threads(threads)
    from llmc_cli.kernels.cpu import loading

    kernels = loading.load_decoding(on_compile)(threads, precision)
    described = _describe(threads, kernels.products_name())
    return Backend(kernels, "cpu", precision, threads, described, "; ".join(why), installed_memory())


def sampling_precisions(device: str, precision: str) -> tuple[str, ...]:
    """Those that ``bench`` samples with: the one asked for, or all that the device has where it is "auto" or none of
    sampling's."""
    known = SAMPLING_PRECISIONS[1:]
    if precision in known:
        return (precision,)
    index, _ = _place(device)
    if index is None:
        return known
    from llmc_cli.kernels.cuda.device import TENSOR_CORES, find

    return ("fp32", "bf16") if find(index)[1] >= TENSOR_CORES else ("fp32",)


def _check(device: str, precision: str, threads: int | None, precisions: tuple[str, ...]) -> None:
    """UsageError for a name that is none."""
    if device not in ("auto", "cpu") and not re.fullmatch(r"cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if precision not in precisions:
        raise UsageError(f"--precision {precision}: expected one of {', '.join(precisions)}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads {threads}: expected at least 1")


def _place(device: str) -> tuple[int | None, list[str]]:
    """The CUDA device to compute on, None for the CPU, and why it is what "auto" became. MissingError where one is
    asked for that cannot be had."""
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
    return 0, [f"cuda: there is a {name}"]


def _open_cuda(index: int, precision: str, training: bool, why: list[str]) -> Backend:
    """Kernels on a CUDA device. MissingError for a precision that it has not."""
    from llmc_cli.kernels.cuda.device import TENSOR_CORES, Device, find

    name, capability = find(index)
    modern = capability >= TENSOR_CORES
    if precision == "auto":
        precision = "bf16" if training and modern else "fp32"
        native = "multiplied" if modern else "not multiplied"
        why.append(f"{precision}: bf16 is {native} natively there" if training else "fp32: the model as it is")
    if precision in ("bf16x3", "int8"):
        raise MissingError(f"--precision {precision}: of the CPU only; use fp32 or bf16")
    if precision in ("tf32", "bf16") and not modern:
        raise MissingError(
            f"--precision {precision}: {name} has compute capability {capability / 10}, and that needs "
            f"{TENSOR_CORES / 10}; use --precision fp32"
        )
    from llmc_cli.kernels.cuda.kernels import CudaKernels

    opened = Device(index, precision == "bf16")
    described = f"{name}, compute capability {capability / 10}, {precision} by cuBLAS"
    kernels = CudaKernels(opened, precision)
    return Backend(kernels, f"cuda:{index}", precision, 1, described, "; ".join(why), opened.free_bytes())


def _has_tiles() -> bool:
    from llmc_cli.kernels.cpu.amx.intrinsics import available

    return available()


def _open_cpu(
    precision: str, threads: int, tiles: bool, free: bool, why: list[str], on_compile: Callable[[str], None] | None
) -> Backend:
    """``free``: float32 may be multiplied by BLAS even where there are tiles, if that is faster."""
    from llmc_cli.kernels.cpu import loading

    made = loading.load_kernels(on_compile)
    matmul = attend = None
    if tiles:
        matmul = loading.load_tiles(PARTS[precision], on_compile)
        attend = loading.load_tile_attention(on_compile) if precision == "bf16" else None
    elif precision == "bf16":
        matmul = loading.load_rounded(on_compile)
    kernels = made(threads, matmul, attend, on_compile)
    products = kernels.matmul.name
    if tiles and free and precision == "fp32":
        from llmc_cli.kernels.cpu.matmul_choice import gain

        gained = gain(kernels.matmul, threads)
        if gained is not None:
            if gained < 1.0:
                kernels = made(threads, None, None, on_compile)
            products = f"{kernels.matmul.name} ({products} measured {gained:.2f} times as fast as BLAS)"
    described = _describe(threads, products)
    return Backend(kernels, "cpu", precision, threads, described, "; ".join(why), installed_memory())


def _describe(threads: int, products: str) -> str:
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}, {products}"


def _allow_threads(threads: int) -> None:
    """Import numba so that its pool can have ``threads``. The pool has one for each core unless an environment variable
    says otherwise at that moment; where more are asked for it is set, and stays, since numba looks at it again.

    Raises MissingError where numba has been imported with less.
    """
    if threads > available_cores() and "numba" not in sys.modules:
        os.environ.setdefault("NUMBA_NUM_THREADS", str(threads))
    import numba

    most: int = vars(numba.config)["NUMBA_NUM_THREADS"]
    if threads > most:
        raise MissingError(
            f"--threads {threads}: numba has been started with {most}; "
            f"set NUMBA_NUM_THREADS={threads} in the environment"
        )
