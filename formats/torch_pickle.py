"""PyTorch's zip files (``pytorch_model.bin``), read without PyTorch and without running what a pickle asks for.

Such a file is a zip archive: ``NAME/data.pkl`` is a pickle of a dict of tensors, whose elements lie in
``NAME/data/KEY``, stored uncompressed. A pickle is a program for a small stack machine, and Python's would call any
function that it names. The machine here knows the instructions that a dict of tensors takes, and has no way to call
anything: names stand for themselves until one of four known constructors is applied.
"""

import math
import pickletools
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmc_cli.formats.errors import MagicError, RangeError, RefusedError, SizeError, UnsafePickleError
from llmc_cli.formats.stream import STORED_AS, item_bytes, map_array
from llmc_cli.formats.tensors import TensorInfo, Tensors, as_values

MAX_PICKLE = 1 << 24
"""Bytes of data.pkl; a thousand tensors take about 200 thousand."""

MAX_RATIO = 1100
"""Deflate packs at most 1,032 bytes into one: more is a false size."""

ORDERED_DICT = "collections OrderedDict"
REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"
REBUILD_PARAMETER = "torch._utils _rebuild_parameter"

STORAGES = {
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch BoolStorage": "bool",
    "torch ByteStorage": "uint8",
    "torch CharStorage": "int8",
    "torch ShortStorage": "int16",
    "torch IntStorage": "int32",
    "torch LongStorage": "int64",
}

PUSH_ARGUMENT = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(NamedTuple):
    """One of the names above, module and name; not the thing itself."""

    text: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    length: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Where a variable number of operands begins on the stack."""


class TorchZip(Tensors):
    """The tensors of one PyTorch zip file. Everything but the elements is checked on opening.

    Raises UnsafePickleError where the pickle asks for anything but a dict of tensors, MagicError for a damaged zip
    file, SizeError and RangeError where tensors do not fit their storages, RefusedError for big-endian files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
                self._folder, program = self._read_program(archive)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise self._damaged(error) from None
        self._tensors = _run(self.path, program)
        self.info = {name: TensorInfo(each.storage.dtype, each.shape) for name, each in self._tensors.items()}
        for name, tensor in self._tensors.items():
            self._check(name, tensor)

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        elements = self._elements(tensor.storage)[tensor.offset :]
        strides = tuple(stride * elements.itemsize for stride in tensor.strides)
        stored = np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
        return as_values(self.path, name, stored, tensor.storage.dtype)

    def _read_program(self, archive: zipfile.ZipFile) -> tuple[str, bytes]:
        """The archive's one folder, and the pickle in it."""
        programs = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(programs) != 1:
            raise MagicError(self.path, f"a zip file with {len(programs)} data.pkl", "a PyTorch checkpoint, with one")
        folder = programs[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in self._members and archive.read(f"{folder}byteorder") != b"little":
            raise RefusedError(self.path, "tensors in big-endian order", "little-endian", "save it on another machine")
        if self._members[programs[0]].file_size > MAX_PICKLE:
            raise SizeError(self.path, f"{programs[0]} of {self._members[programs[0]].file_size:,} bytes", "fewer")
        return folder, archive.read(programs[0])

    def _member(self, storage: _Storage) -> zipfile.ZipInfo | None:
        return self._members.get(f"{self._folder}data/{storage.key}")

    def _check(self, name: str, tensor: _Tensor) -> None:
        storage = tensor.storage
        member = self._member(storage)
        if member is None:
            raise RangeError(self.path, f"no data/{storage.key}, the storage of {name}", "it in the archive")
        needed = storage.length * item_bytes(storage.dtype)
        if member.file_size != needed:
            raise SizeError(self.path, f"{member.file_size:,} bytes in the storage of {name}", f"{needed:,}")
        stored = member.compress_type == zipfile.ZIP_STORED
        most = member.compress_size * (1 if stored else MAX_RATIO)
        if needed > most or member.compress_size > self.path.stat().st_size:
            raise SizeError(
                self.path, f"{needed:,} bytes for {name} from {member.compress_size:,}", f"at most {most:,}"
            )
        size = math.prod(tensor.shape)
        last = tensor.offset + sum(
            (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        # More elements than the storage holds would be a view that repeats some: nothing that is saved needs one.
        if size > storage.length or (size > 0 and last >= storage.length) or tensor.offset > storage.length:
            raise RangeError(self.path, f"{name} reaching beyond its storage", f"{storage.length:,} elements at most")

    def _elements(self, storage: _Storage) -> NDArray[Any]:
        """(length,) elements: mapped where they are stored as they are, else unpacked."""
        member = self._member(storage)
        assert member is not None  # _check has seen it
        if member.compress_type == zipfile.ZIP_STORED:
            offset = self._data_offset(member)
            if offset + member.file_size > self.path.stat().st_size:
                raise self._damaged(f"{member.filename} reaches beyond the end")
            return map_array(self.path, storage.dtype, offset, storage.length)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                unpacked = file.read(member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise self._damaged(error) from None
        if len(unpacked) != member.file_size:
            raise self._damaged(f"{member.filename} is shorter than it says")
        return np.frombuffer(unpacked, STORED_AS[storage.dtype])

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Where a stored member's bytes begin: behind its local header (30 bytes, its name, an extra field)."""
        with self.path.open("rb") as file:
            file.seek(member.header_offset)
            local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04" or local[6] & 1:
            raise self._damaged(f"no plain local header of {member.filename}")
        return (
            member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )

    def _damaged(self, why: object) -> MagicError:
        return MagicError(self.path, f"a damaged zip file ({why})", "a PyTorch checkpoint", "fetch it anew")


def _run(path: Path, program: bytes) -> dict[str, _Tensor]:
    """The dict of tensors that a pickle describes."""
    try:
        result = _Machine(path).run(program)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UnsafePickleError(
            path, f"a pickle that breaks off or breaks the rules ({type(error).__name__})", "a dict of tensors"
        ) from None
    if not isinstance(result, dict):
        raise UnsafePickleError(path, f"a pickled {type(result).__name__}", "a dict of tensors")
    for name, value in result.items():
        if not isinstance(value, _Tensor):
            raise UnsafePickleError(path, f"a {type(value).__name__} under {name!r}", "a dict of tensors")
    return result


class _Machine:
    """The pickle instructions that a dict of tensors takes, in the protocols 2 to 5."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, program: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of an escape that Python does not know, in damage
            for opcode, argument, _ in pickletools.genops(program):
                self.step(opcode.name, argument)
        (result,) = self.stack
        return result

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in PUSH_ARGUMENT:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in TUPLES:
            items = tuple(stack[-TUPLES[name] :])
            del stack[-TUPLES[name] :]
            stack.append(items)
        else:
            self.step_rarer(name, argument)

    def step_rarer(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_Mark())
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.name(argument))
            case "STACK_GLOBAL":
                last, module = stack.pop(), stack.pop()
                stack.append(self.name(f"{module} {last}"))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.construct(function, arguments))
            case "BUILD":
                stack.pop()  # the attributes of a state dict (its modules' versions) say nothing about tensors
                if not isinstance(stack[-1], dict):
                    raise self.unsafe("a change of an object's attributes")
            case _:
                raise self.unsafe(f"the instruction {name}")

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            raise self.unsafe("a dict with other keys than names")
        target.update(zip(items[::2], items[1::2], strict=True))

    def name(self, text: str) -> _Name:
        if text not in (ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER) and text not in STORAGES:
            raise self.unsafe(text.replace(" ", "."))
        return _Name(text)

    def storage(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", _Name(text), str(key), str(), int(length)) if text in STORAGES and length >= 0:
                return _Storage(STORAGES[text], key, length)
        raise self.unsafe("a reference to something other than a storage")

    def construct(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case (_Name(text), ()) if text == ORDERED_DICT:
                return {}
            case (_Name(text), (_Tensor() as tensor, bool(), {})) if text == REBUILD_PARAMETER:
                return tensor
            case (_Name(text), (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), {}, *_)) if (
                text == REBUILD_TENSOR
                and len(shape) == len(strides)
                and all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
            ):
                return _Tensor(storage, offset, shape, strides)
        raise self.unsafe("a call with unexpected arguments")

    def unsafe(self, wish: str) -> UnsafePickleError:
        return UnsafePickleError(
            self.path, f"a pickle that asks for {wish}", "a dict of tensors and nothing else", "it may run code: beware"
        )
