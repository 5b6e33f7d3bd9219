"""Reading PyTorch's zip files (``pytorch_model.bin``) without PyTorch and without executing code from the pickle.

Such a file is a zip archive: ``NAME/data.pkl`` is a pickle of a dict of tensors, whose elements are in
``NAME/data/KEY``, stored uncompressed. A pickle is a program for a small stack machine, and Python's implementation
calls any function that it names. The interpreter here supports only the instructions that a dict of tensors needs and
cannot call functions: a global is a name, and only three known constructors can be applied.
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
from llmc_cli.formats.stream import STORED_DTYPES, item_bytes, map_array
from llmc_cli.formats.tensors import TensorInfo, Tensors, decode_tensor

MAX_PICKLE_BYTES = 1 << 24
"""Limit for data.pkl; a thousand tensors need about 200 kB."""

MAX_COMPRESSION_RATIO = 1100
"""Deflate compresses by a factor of 1,032 at most, so a larger ratio means a wrong size."""

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


class _Global(NamedTuple):
    """A reference to a global, one of the names above. The object itself is never imported."""

    name: str


class _Storage(NamedTuple):
    dtype: str
    key: str
    length: int  # elements


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements, like the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    """Marks the start of a variable number of operands on the stack."""


class TorchZip(Tensors):
    """The tensors of a PyTorch zip file. Opening it checks everything except the elements.

    Raises UnsafePickleError if the pickle contains anything but a dict of tensors, MagicError for a damaged zip file,
    SizeError and RangeError if tensors do not match their storages, and RefusedError for big-endian files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._members = {member.filename: member for member in archive.infolist()}
                self._folder, pickled = self._read_pickle(archive)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise self._damaged(error) from None
        self._tensors = _load(self.path, pickled)
        self.info = {name: TensorInfo(each.storage.dtype, each.shape) for name, each in self._tensors.items()}
        for name, tensor in self._tensors.items():
            self._check(name, tensor)

    def __getitem__(self, name: str) -> NDArray[Any]:
        tensor = self._tensors[name]
        elements = self._elements(tensor.storage)[tensor.offset :]
        strides = tuple(stride * elements.itemsize for stride in tensor.strides)
        stored = np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)
        return decode_tensor(self.path, name, stored, tensor.storage.dtype)

    def _read_pickle(self, archive: zipfile.ZipFile) -> tuple[str, bytes]:
        """Return the name of the archive's folder and the content of its data.pkl."""
        pickles = [name for name in self._members if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise MagicError(self.path, f"a zip file with {len(pickles)} data.pkl files", "a PyTorch checkpoint with 1")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in self._members and archive.read(f"{folder}byteorder") != b"little":
            raise RefusedError(
                self.path, "big-endian tensors", "little-endian tensors", "save it again on a little-endian machine"
            )
        size = self._members[pickles[0]].file_size
        if size > MAX_PICKLE_BYTES:
            raise SizeError(self.path, f"{size:,} bytes in {pickles[0]}", f"at most {MAX_PICKLE_BYTES:,}")
        return folder, archive.read(pickles[0])

    def _member(self, storage: _Storage) -> zipfile.ZipInfo | None:
        return self._members.get(f"{self._folder}data/{storage.key}")

    def _check(self, name: str, tensor: _Tensor) -> None:
        storage = tensor.storage
        member = self._member(storage)
        if member is None:
            raise RangeError(
                self.path,
                f"no data/{storage.key} in the archive",
                f"it, as the storage of {name}",
                "the file is damaged: download it again",
            )
        needed = storage.length * item_bytes(storage.dtype)
        if member.file_size != needed:
            raise SizeError(self.path, f"{member.file_size:,} bytes in the storage of {name}", f"{needed:,} bytes")
        stored = member.compress_type == zipfile.ZIP_STORED
        most = member.compress_size * (1 if stored else MAX_COMPRESSION_RATIO)
        if needed > most or member.compress_size > self.path.stat().st_size:
            raise SizeError(
                self.path,
                f"{needed:,} bytes for {name}, compressed to {member.compress_size:,} bytes",
                f"at most {most:,} bytes",
                "the file is damaged: download it again",
            )
        size = math.prod(tensor.shape)
        last = tensor.offset + sum(
            (length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True)
        )
        # A tensor with more elements than its storage would repeat some of them, which saved models do not need.
        if size > storage.length or (size > 0 and last >= storage.length) or tensor.offset > storage.length:
            raise RangeError(
                self.path,
                f"{name} of shape {tensor.shape} beyond the end of its storage",
                f"at most {storage.length:,} elements",
                "the file is damaged: download it again",
            )

    def _elements(self, storage: _Storage) -> NDArray[Any]:
        """Return the elements (length,) of a storage: mapped if stored uncompressed, else decompressed."""
        member = self._member(storage)
        assert member is not None  # checked by _check
        if member.compress_type == zipfile.ZIP_STORED:
            offset = self._data_offset(member)
            if offset + member.file_size > self.path.stat().st_size:
                raise self._damaged(f"{member.filename} extends beyond the end of the file")
            return map_array(self.path, storage.dtype, offset, storage.length)
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as file:
                unpacked = file.read(member.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise self._damaged(error) from None
        if len(unpacked) != member.file_size:
            raise self._damaged(f"{member.filename} is shorter than its entry says")
        return np.frombuffer(unpacked, STORED_DTYPES[storage.dtype])

    def _data_offset(self, member: zipfile.ZipInfo) -> int:
        """Return the offset of a member's data, which follows its local header (30 bytes, a name, an extra field)."""
        with self.path.open("rb") as file:
            file.seek(member.header_offset)
            local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04" or local[6] & 1:
            raise self._damaged(f"{member.filename} has no valid local header, or is encrypted")
        return (
            member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        )

    def _damaged(self, reason: object) -> MagicError:
        return MagicError(self.path, f"a damaged zip file ({reason})", "a PyTorch checkpoint", "download it again")


def _load(path: Path, pickled: bytes) -> dict[str, _Tensor]:
    """Return the dict of tensors in a pickle."""
    try:
        result = _Unpickler(path).run(pickled)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UnsafePickleError(
            path, f"a truncated or invalid pickle ({type(error).__name__})", "a dict of tensors"
        ) from None
    if not isinstance(result, dict):
        raise UnsafePickleError(path, f"a pickle of type {type(result).__name__}", "a dict of tensors")
    for name, value in result.items():
        if not isinstance(value, _Tensor):
            raise UnsafePickleError(
                path, f"a value of type {type(value).__name__} for {name!r}", "a dict of tensors",
                "save the model's state dict on its own",
            )  # fmt: skip
    return result


class _Unpickler:
    """An interpreter for the pickle instructions that a dict of tensors needs, of protocols 2 to 5."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # invalid escape sequences in damaged files
            for opcode, argument, _ in pickletools.genops(pickled):
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
            self.step_other(name, argument)

    def step_other(self, name: str, argument: Any) -> None:
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
                stack.append(self.find_global(argument))
            case "STACK_GLOBAL":
                qualname, module = stack.pop(), stack.pop()
                stack.append(self.find_global(f"{module} {qualname}"))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.construct(function, arguments))
            case "BUILD":
                stack.pop()  # a state dict's attributes (the versions of its modules) are not needed
                if not isinstance(stack[-1], dict):
                    raise self.unsafe("an instruction that sets an object's attributes")
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
            raise self.unsafe("a dict whose keys are not strings")
        target.update(zip(items[::2], items[1::2], strict=True))

    def find_global(self, name: str) -> _Global:
        if name not in (ORDERED_DICT, REBUILD_TENSOR, REBUILD_PARAMETER) and name not in STORAGES:
            raise self.unsafe(name.replace(" ", "."))
        return _Global(name)

    def storage(self, identity: Any) -> _Storage:
        match identity:
            case ("storage", _Global(name), str(key), str(), int(length)) if name in STORAGES and length >= 0:
                return _Storage(STORAGES[name], key, length)
        raise self.unsafe("a reference to something other than a storage")

    def construct(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case (_Global(name), ()) if name == ORDERED_DICT:
                return {}
            case (_Global(name), (_Tensor() as tensor, bool(), {})) if name == REBUILD_PARAMETER:
                return tensor
            case (
                _Global(name),
                (_Storage() as storage, int(offset), tuple(shape), tuple(strides), bool(), {}, *_),
            ) if (
                name == REBUILD_TENSOR
                and len(shape) == len(strides)
                and all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
            ):
                return _Tensor(storage, offset, shape, strides)
        raise self.unsafe("a call with unexpected arguments")

    def unsafe(self, content: str) -> UnsafePickleError:
        return UnsafePickleError(
            self.path,
            f"a pickle that contains {content}",
            "only a dict of tensors",
            "loading it with Python could execute code; get the model as safetensors, or save its state dict alone",
        )
