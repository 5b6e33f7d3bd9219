"""Run CUDA kernels on the CPU and detect bugs in them. README.md describes the checks and the implementation."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

HERE = Path(__file__).parent
RUNTIME = ("launch.cpp", "warp.cpp", "copies.cpp", "memory.cpp")
FILES = (*RUNTIME, "runtime.h", "context.h", "emulator.h", "emulator.py")

MAX_THREADS = 1024
MAX_SHARED = 227 * 1024
"""Maximum bytes of dynamic shared memory per block on an H100."""
MAX_GRID = (2**31 - 1, 65535, 65535)
MAX_BLOCK = (1024, 1024, 64)

COMPILE = (
    *("-std=c++17", "-fPIC", "-g1", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-gnu-unique", "-fno-threadsafe-statics", "-fno-optimize-sibling-calls", "-Werror=uninitialized"),
)
# Loads must not be hoisted out of loops, where they could access memory that the loop never reads.
CHECKED = (
    *("-O1", "-fno-tree-loop-im", "-fsanitize=thread"),
    "-fsanitize=alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow",
)
LINK = ("-shared", "-nostartfiles", "-Wl,-Bsymbolic", "-Wl,-z,defs")

BRACKETED = r"\((?P<{}>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"
KERNEL = re.compile(
    rf'extern\s+"C"\s+__global__\s+(?:__launch_bounds__\s*{BRACKETED.format("first")}\s*)?'
    rf"void\s+(?:__launch_bounds__\s*{BRACKETED.format('second')}\s*)?(?P<name>\w+)(?=\s*\()"
)
DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:(?:__attribute__\s*\(\(.*?\)\)\)|alignas\s*\(.*?\))\s*)?"
    r"(?P<type>\w[\w:\s]*?)\s*\b(?P<name>\w+)\s*\[\s*\]\s*;"
)


class EmulatorError(RuntimeError):
    """A fault of a kernel or launch, or a missing requirement of the emulator."""


# ---- Libraries -------------------------------------------------------------------------------------------------------


def _run(*command: str, folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulatorError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@functools.cache
def _compiler() -> str:
    if sys.platform != "linux":
        raise EmulatorError(f"the CUDA emulator runs on Linux, not on {sys.platform}")
    path = shutil.which("g++")
    if path is None:
        raise EmulatorError("the CUDA emulator needs g++, which was not found on the PATH")
    return path


@functools.cache
def _folder() -> Path:
    """Return the cache folder of compiled libraries. It must belong to this user, because its code is executed."""
    folder = Path(tempfile.gettempdir()) / f"cuda-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise EmulatorError(f"{folder} belongs to another user")
    return folder


@functools.cache
def _version() -> bytes:
    """Return everything that a library depends on besides its source."""
    compiler = _run(_compiler(), "-dumpfullversion").encode()
    return b"\0".join([compiler, *((HERE / name).read_bytes() for name in FILES)])


def _library(text: str, build: Callable[[Path], Path]) -> Path:
    """Return the library for ``text``, built by ``build`` in a temporary folder if it is not cached.

    A file lock ensures that only one process builds it.
    """
    path = _folder() / f"{hashlib.sha256(_version() + text.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=_folder()) as folder:
                    build(Path(folder)).replace(path)
    return path


def _build_runtime(folder: Path) -> Path:
    options = ("-std=c++20", "-O2", "-fPIC", "-g1", "-fno-exceptions", "-Wall", "-Wextra", "-shared")
    sources = [str(HERE / name) for name in RUNTIME]
    _run(_compiler(), *options, *sources, "-o", "runtime.so", folder=folder)
    return folder / "runtime.so"


def _runtime_path() -> Path:
    return _library("runtime", _build_runtime)


def _build_program(folder: Path, source: str, options: Sequence[str], check: bool) -> Path:
    (folder / "program.cu").write_text(source)
    header = ("-nostdinc", "-include", str(HERE / "emulator.h"))
    text = _run(_compiler(), "-E", "-x", "c++", "-std=c++17", *header, *options, "program.cu", folder=folder)
    (folder / "program.ii").write_text(_as_cpp(text))
    _run(_compiler(), *COMPILE, *(CHECKED if check else ("-O2",)), "-c", "program.ii", folder=folder)
    _run(_compiler(), *LINK, "program.o", str(_runtime_path()), "-lm", "-o", "program.so", folder=folder)
    return folder / "program.so"


def _as_cpp(text: str) -> str:
    """Convert preprocessed CUDA to C++: kernels become functions listed in a table. Line numbers do not change."""
    entries = []

    def function(kernel: re.Match[str]) -> str:
        name, bounds = kernel["name"], kernel["first"] or kernel["second"] or ""
        entries.append(f'emulator::entry<&{name}>("{name}", emulator::launch_bounds({bounds})),')
        return 'extern "C" ' + "\n" * kernel[0].count("\n") + f"void {name}"

    text = KERNEL.sub(function, text)
    text = DYNAMIC_SHARED.sub(r"\g<type>* const \g<name> = reinterpret_cast<\g<type>*>(emulator_dynamic_shared);", text)
    text = re.sub(r"\b__shared__\b", "static", text)
    return f"{text}\nconst emulator::Kernel emulator_kernels[] = {{{' '.join(entries)} {{}}}};\n"


# ---- Programs --------------------------------------------------------------------------------------------------------


class _Kernel(ctypes.Structure):
    """``emulator::Kernel`` in emulator.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kinds", ctypes.POINTER(ctypes.c_char_p)),
        ("bound", ctypes.c_int),
        ("call", ctypes.c_void_p),
    )


class _Launch(ctypes.Structure):
    """``Launch`` in runtime.h."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("call", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_shared", ctypes.c_uint),
        ("check", ctypes.c_int),
        ("image", ctypes.c_void_p * 3),
    )


@functools.cache
def _runtime() -> ctypes.CDLL:
    runtime = ctypes.CDLL(str(_runtime_path()))
    runtime.emulator_run.restype = ctypes.c_char_p
    runtime.emulator_register.argtypes = (ctypes.c_size_t, ctypes.c_size_t)
    runtime.emulator_unregister.argtypes = (ctypes.c_size_t,)
    runtime.emulator_schedule.argtypes = (ctypes.c_int, ctypes.c_uint64)
    return runtime


_lock = threading.Lock()


class Program:
    """A compiled program.

    Attributes:
        names: names of the kernels
        check: whether launches are checked
    """

    def __init__(self, source: str, options: Sequence[str] = (), check: bool = False) -> None:
        """Compile ``source``, CUDA C++ without includes. ``options`` other than -D are ignored.

        A checked program is about ten times slower and detects the errors listed in README.md.
        """
        options = [option for option in options if option.startswith("-D")]
        text = "\0".join((source, *options, f"check={check}"))
        _runtime()
        self._path = _library(text, lambda folder: _build_program(folder, source, options, check))
        self._library = ctypes.CDLL(str(self._path))
        self._places = _places(source)
        self._image = (ctypes.c_void_p * 3)()
        self._library.emulator_image(self._image)
        self._kernels = {}
        for kernel in ctypes.cast(self._library.emulator_kernels, ctypes.POINTER(_Kernel)):
            if kernel.name is None:
                break
            self._kernels[kernel.name.decode()] = kernel
        self.names = tuple(self._kernels)
        self.check = check

    def _kernel(self, name: str) -> _Kernel:
        if name not in self._kernels:
            raise EmulatorError(f"launch: no kernel {name}; the program has {', '.join(self.names)}")
        return self._kernels[name]

    def signature(self, name: str) -> list[str]:
        """Return the kernel's argument types: P (pointer), i4, i8, f4."""
        kinds = []
        for kind in self._kernel(name).kinds:
            if kind is None:
                break
            kinds.append(kind.decode())
        return kinds

    def launch(
        self, name: str, grid: Sequence[int], block: Sequence[int], args: Sequence[object], shared: int = 0
    ) -> None:
        """Run a kernel. ``args`` are np.int32, np.int64 or np.float32, and addresses as int for pointers.

        Raises:
            EmulatorError: if a GPU would reject the launch, or the kernel has a fault.
        """
        kernel = self._kernel(name)
        launch = _Launch(
            kernel=kernel.name,
            call=kernel.call,
            grid=_sizes(name, "grid", grid, MAX_GRID),
            block=_sizes(name, "block", block, MAX_BLOCK),
            dynamic_shared=shared,
            check=self.check,
            image=self._image,
        )
        threads = int(np.prod(launch.block[:]))
        if threads > kernel.bound:
            raise EmulatorError(f"launch: {name}: a block of {threads} threads, where {kernel.bound} are allowed")
        if not 0 <= shared <= MAX_SHARED:
            raise EmulatorError(f"launch: {name}: {shared} bytes of shared memory, where {MAX_SHARED} are allowed")
        slots = (ctypes.c_uint64 * max(1, len(args)))(*self._slots(name, args))
        launch.slots = ctypes.addressof(slots)
        with _lock:
            error = _runtime().emulator_run(ctypes.byref(launch))
        if error is not None:
            raise EmulatorError(self._explain(error.decode()))

    def _slots(self, name: str, args: Sequence[object]) -> list[int]:
        """Return the arguments as 8-byte integers."""
        kinds = self.signature(name)
        if len(args) != len(kinds):
            raise EmulatorError(f"launch: {name}: {len(args)} arguments, where it takes {len(kinds)}")
        types = {"P": int, "i4": np.int32, "i8": np.int64, "f4": np.float32}
        slots = []
        for number, (kind, arg) in enumerate(zip(kinds, args, strict=True)):
            if type(arg) is not types[kind]:
                what = "a pointer, as int" if kind == "P" else f"a np.{types[kind].__name__}"
                raise EmulatorError(f"launch: {name}: argument {number} is {what}, not {type(arg).__name__}")
            slots.append(int(arg.view(np.uint32)) if kind == "f4" else int(arg) % 2**64)
        return slots

    def _explain(self, message: str) -> str:
        """Replace code addresses in a runtime error by source lines and shared memory offsets by variable names."""
        message = re.sub(r"@c:(\d+)@", lambda match: self._place(int(match[1])), message)
        return re.sub(r"@s:(\d+)@", lambda match: self._variable(int(match[1])), message)

    def _place(self, site: int) -> str:
        """Describe a ``Site`` of runtime.h by the line of the innermost function and those of its callers."""
        frames = _run("addr2line", "-i", "-e", str(self._path), hex(site)).splitlines()
        places = [match.groups() for frame in frames if (match := re.search(r"([^/]*):(\d+)", frame))]
        known = [(file, int(line)) for file, line in places if (file, int(line)) in self._places]
        return ", called from ".join(f"{file}:{line} `{self._places[file, line]}`" for file, line in known) or "unknown"

    def _variable(self, offset: int) -> str:
        """Describe the static shared variable at an offset into the library."""
        for line in _run("nm", "-S", "-C", "--defined-only", str(self._path)).splitlines():
            match = re.fullmatch(r"(\w+) (\w+) [bB] (.*)", line)
            if match and int(match[1], 16) <= offset < int(match[1], 16) + int(match[2], 16):
                return f"shared {match[3].split('::')[-1]} + {offset - int(match[1], 16)}"
        return "shared memory between variables"


def _places(source: str) -> dict[tuple[str, int], str]:
    """Return the text of each line by file and line number, taking ``#line`` directives into account."""
    file, number = "program.cu", 0
    places = {}
    for text in source.splitlines():
        number += 1
        if directive := re.match(r'#\s*line\s+(\d+)(?:\s+"(.*)")?', text):
            number, file = int(directive[1]) - 1, directive[2] or file
        places[file, number] = text.strip()
    return places


def _sizes(kernel: str, what: str, sizes: Sequence[int], limits: Sequence[int]) -> ctypes.Array[ctypes.c_uint]:
    full = (*sizes, 1, 1)[:3]
    if not 1 <= len(sizes) <= 3 or not all(1 <= size <= bound for size, bound in zip(full, limits, strict=True)):
        raise EmulatorError(f"launch: {kernel}: no {what} is {tuple(sizes)}; the largest is {limits}")
    return (ctypes.c_uint * 3)(*full)


# ---- State shared by all programs ------------------------------------------------------------------------------------


def register(address: int, nbytes: int) -> None:
    """Register device memory. Checked programs may not access any other memory."""
    with _lock:
        if not _runtime().emulator_register(address, nbytes):
            what = f"{nbytes} bytes at {address:#x}"
            raise EmulatorError(f"{what} overlap registered memory; unregister memory when it is freed")


def unregister(address: int) -> None:
    with _lock:
        if not _runtime().emulator_unregister(address):
            raise EmulatorError(f"no memory is registered at {address:#x}")


def schedule(seed: int | None) -> None:
    """Set the order of blocks, and of threads between barriers: by number, or shuffled with ``seed``."""
    _runtime().emulator_schedule(seed is not None, seed or 0)


def counters() -> dict[str, int]:
    """Return event counts since the last call: thread switches, barriers, warp_operations of all kinds, mma,
    ldmatrix_phases (one per 8 x 8 matrix), ldmatrix_conflicts (phases with bank conflicts), and checked accesses."""
    names = (
        *("switches", "barriers", "warp_operations", "mma"),
        *("ldmatrix_phases", "ldmatrix_conflicts", "accesses"),
    )
    values = (ctypes.c_uint64 * len(names))()
    _runtime().emulator_counters(values)
    return dict(zip(names, values, strict=True))
