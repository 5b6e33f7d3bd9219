"""Reading PyTorch's zip files without PyTorch and without running code."""

import contextlib
import math
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.paths import FIXTURES

from llmc_cli.formats import stream
from llmc_cli.formats.errors import (
    FormatError,
    MagicError,
    NonFiniteError,
    RangeError,
    RefusedError,
    SizeError,
    UnsafePickleError,
)
from llmc_cli.formats.registry import identify
from llmc_cli.formats.tensors import TensorInfo
from llmc_cli.formats.torch_pickle import TorchZip

GOLDEN = FIXTURES / "torch_checkpoint.bin"
BASE = np.arange(12, dtype=np.float32).reshape(3, 4)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def name(module, last):
    return f"c{module}\n{last}\n".encode()


def numbers(*values):
    return b"(" + b"".join(number(value) for value in values) + b"t"


def storage(kind="FloatStorage", key="0", count=12):
    return b"(" + text("storage") + name("torch", kind) + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(shape=(3, 4), strides=(4, 1), offset=0, elements=None):
    """Return the pickle instructions for one tensor."""
    elements = storage() if elements is None else elements
    hooks = name("collections", "OrderedDict") + b")R"
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + elements
        + number(offset)
        + numbers(*shape)
        + numbers(*strides)
        + b"\x89"
        + hooks
        + b"tR"
    )


def state_dict(**values):
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in values.items()) + b"u."


def write(path, program, data=None, compression=zipfile.ZIP_STORED, **extra):
    """Write a PyTorch checkpoint with the given pickle and storages (``data``, by key)."""
    data = {"0": BASE.tobytes()} if data is None else data
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("m/data.pkl", program)
        for key, content in data.items():
            archive.writestr(f"m/data/{key}", content)
        for member, content in extra.items():
            archive.writestr(f"m/{member}", content)
    return path


def test_read_golden_file():
    found = TorchZip(GOLDEN)
    expected = {
        "float32": BASE,
        "float16": BASE / 4,
        "bfloat16": -BASE,
        "transposed": (BASE + 100).T,
        "sliced": (BASE + 200)[1:, 1:3],
        "tied": BASE,
        "parameter": np.array([0.5, -0.5]),
        "scalar": np.array(7.0),
        "empty": np.empty((0, 3)),
        "int64": np.array([-1, 2**40]),
        "uint8": np.array([0, 255]),
        "bool": np.array([True, False, True]),
    }
    assert list(found) == list(expected)
    for key, values in expected.items():
        assert np.array_equal(found[key], values), key
        assert found[key].shape == found.info[key].shape == values.shape
        assert found[key].dtype == (np.float32 if "float" in found.info[key].dtype else found.info[key].dtype)
    assert found.info["bfloat16"] == TensorInfo("bfloat16", (3, 4))


def test_uncompressed_float32_is_memory_mapped_and_read_only(tmp_path):
    content = np.zeros(20 * stream.CHUNK, np.float32).tobytes()
    shape = (20, stream.CHUNK)
    one = tensor(shape, (stream.CHUNK, 1), elements=storage(count=20 * stream.CHUNK))
    path = write(tmp_path / "f", state_dict(w=one), {"0": content})
    tracemalloc.start()
    try:
        values = TorchZip(path)["w"]
        assert values.shape == shape
        assert not values.flags.writeable
        assert tracemalloc.get_traced_memory()[1] < 4 * stream.CHUNK
    finally:
        tracemalloc.stop()


def test_compressed_members_are_decompressed(tmp_path):
    path = write(tmp_path / "f", state_dict(w=tensor()), compression=zipfile.ZIP_DEFLATED)
    assert np.array_equal(TorchZip(path)["w"], BASE)


def test_strides(tmp_path):
    transposed = tensor((4, 3), (1, 4))
    column = tensor((3,), (4,), 2)
    path = write(tmp_path / "f", state_dict(t=transposed, c=column))
    assert np.array_equal(TorchZip(path)["t"], BASE.T)
    assert np.array_equal(TorchZip(path)["c"], BASE[:, 2])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 4), max_size=3),
    order=st.randoms(use_true_random=False),
    offset=st.integers(0, 3),
    kind=st.sampled_from([("FloatStorage", "<f4"), ("HalfStorage", "<f2"), ("LongStorage", "<i8")]),
    compression=st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
)
def test_round_trip_of_any_layout(tmp_path, lengths, order, offset, kind, compression):
    axes = list(range(len(lengths)))
    order.shuffle(axes)
    count = offset + math.prod(lengths)
    elements = np.arange(count, dtype=kind[1])
    values = elements[offset:].reshape(lengths).transpose(axes)
    strides = [stride // elements.itemsize for stride in values.strides]
    one = tensor(values.shape, strides, offset, storage(kind[0], count=count))
    path = write(tmp_path / "f", state_dict(w=one), {"0": elements.tobytes()}, compression)
    assert np.array_equal(TorchZip(path)["w"], values)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path, protocol):
    path = write(tmp_path / "f", pickle.dumps(OrderedDict(), protocol))
    assert dict(TorchZip(path)) == {}


class Malice:
    """An object whose pickle makes Python's unpickler call a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickle_with_code_is_refused_without_running_it(tmp_path, protocol):
    mark = tmp_path / "it ran"
    program = pickle.dumps({"w": Malice(os.mkdir, str(mark))}, protocol)
    with pytest.raises(UnsafePickleError):
        TorchZip(write(tmp_path / "f", program))
    assert not mark.exists()
    pickle.loads(program)
    assert mark.exists(), "the test must be able to fail"


@pytest.mark.parametrize(
    ("module", "last"),
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("collections", "OrderedDict.update"),
        ("collections", "defaultdict"),
        ("torch", "load"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch.storage", "_load_from_bytes"),
        ("numpy.core.multiarray", "_reconstruct"),
    ],
)
def test_unknown_globals_are_refused(tmp_path, module, last):
    for program in (
        name(module, last),
        b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(last)]) + last.encode() + b"\x93",
    ):
        with pytest.raises(UnsafePickleError, match=f"pickle that contains {module}.{last}"):
            TorchZip(write(tmp_path / "f", b"\x80\x04" + program + b"."))


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"\x80\x02",
        b"\x80\x02}",
        b"\x80\x02}}.",
        b"\x80\x02N.",
        b"\x80\x02].",
        b"\x80\x02(.",
        b"\x80\x02}(u",
        b"\x80\x02u.",
        b"\x80\x02h\x05.",
        b"\x80\x02}R.",
        b"\x80\x02})R.",
        b"\x80\x02]}b.",
        b"\x80\x02\xff.",
        b"\x80\x02\x82\x01.",
        b"\x80\x02I1\n.",
        b"X\xff\xff\xff\xff.",
        state_dict(w=number(1)),
        state_dict(w=b"}"),
        b"\x80\x02}" + number(1) + tensor() + b"s.",
        b"\x80\x02}(" + text("w") + b"u.",
        b"\x80\x02}" + text("w") + b"Q.",
        b"\x80\x02" + tensor() + b".",
        state_dict(w=name("collections", "OrderedDict")),
        state_dict(w=name("collections", "OrderedDict") + b"(]tR"),
        state_dict(w=name("torch", "FloatStorage") + b")R"),
        state_dict(w=name("torch", "FloatStorage") + b")\x81"),
        state_dict(w=tensor(elements=b"N")),
        state_dict(w=tensor(elements=storage("OrderedDict"))),
        state_dict(w=tensor(elements=storage(count=-1))),
        state_dict(w=tensor((3, 4), (4,))),
        state_dict(w=tensor((-3, 4), (4, 1))),
        state_dict(w=tensor((3, 4), (-4, 1))),
        state_dict(w=tensor((3, 4), (4, 1), -1)),
        state_dict(w=tensor() + b"}b"),
    ],
)
def test_pickles_of_other_objects_are_refused(tmp_path, program):
    with pytest.raises(UnsafePickleError):
        TorchZip(write(tmp_path / "f", program))


def test_large_memo_index_does_not_allocate(tmp_path):
    """Python's own unpickler allocates 2^31 entries for a memo index of that size."""
    program = b"\x80\x02}r\xff\xff\xff\x7f."
    tracemalloc.start()
    try:
        assert dict(TorchZip(write(tmp_path / "f", program))) == {}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("one", "error"),
    [
        (tensor((3, 5), (4, 1)), RangeError),
        (tensor((4, 4), (4, 1)), RangeError),
        (tensor((3, 4), (4, 1), 1), RangeError),
        (tensor((), (), 12), RangeError),
        (tensor((0,), (1,), 13), RangeError),
        (tensor((3, 4), (2**60, 1)), RangeError),
        (tensor((2**40, 2**40), (0, 0)), RangeError),
        (tensor((13,), (0,)), RangeError),
        (tensor(elements=storage(key="1")), RangeError),
        (tensor(elements=storage(key="../data.pkl")), RangeError),
        (tensor(elements=storage(count=11)), SizeError),
        (tensor(elements=storage(count=13)), SizeError),
        (tensor(elements=storage(count=2**62)), SizeError),
        (tensor(elements=storage("HalfStorage")), SizeError),
    ],
)
def test_tensors_outside_their_storage_are_rejected_without_allocating(tmp_path, one, error):
    path = write(tmp_path / "f", state_dict(w=one))
    tracemalloc.start()
    try:
        with pytest.raises(error):
            TorchZip(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_excessive_compression_ratio_is_rejected(tmp_path):
    count = 2**28
    path = write(
        tmp_path / "f", state_dict(w=tensor((count,), (1,), elements=storage(count=count))), {"0": bytes(4)}, 8
    )
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)  # the second entry of the directory
    content[at + 24 : at + 28] = struct.pack("<I", 4 * count)
    path.write_bytes(content)
    with pytest.raises(SizeError, match=f"{4 * count:,} bytes for w"):
        TorchZip(path)


def test_damaged_zip_files_are_rejected(tmp_path):
    path = write(tmp_path / "f", state_dict(w=tensor()))
    content = path.read_bytes()
    for damaged in (b"", content[:-30], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(MagicError, match="damaged zip"):
            TorchZip(path)
    local = bytearray(content)
    at = content.index(b"PK\x03\x04", 4)  # the storage's local header
    local[at] = 0
    path.write_bytes(local)
    with pytest.raises(MagicError, match="local header"):
        TorchZip(path)["w"]
    local = bytearray(content)
    local[at + 28 : at + 30] = b"\xff\xff"
    path.write_bytes(local)
    with pytest.raises(MagicError, match="beyond the end"):
        TorchZip(path)["w"]


def test_damaged_compressed_member_is_rejected(tmp_path):
    path = write(tmp_path / "f", state_dict(w=tensor()), compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x03\x04", 4) + 30 + len("m/data/0")
    content[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    with pytest.raises(MagicError, match="damaged zip"):
        TorchZip(path)["w"]


def test_unknown_compression_is_rejected(tmp_path):
    path = write(tmp_path / "f", state_dict(w=tensor()))
    content = path.read_bytes().replace(b"PK\3\4\x14\0\0\0\0\0", b"PK\3\4\x14\0\0\0\x63\0")
    content = content.replace(b"PK\1\2\x14\3\x14\0\0\0\0\0", b"PK\1\2\x14\3\x14\0\0\0\x63\0")
    path.write_bytes(content)
    with pytest.raises(MagicError):
        TorchZip(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1028), st.integers(0, 255))
@example(836, 0)  # an escape sequence that Python warns about
def test_any_damaged_byte_of_a_pickle_raises_format_error_or_nothing(tmp_path, place, value):
    with zipfile.ZipFile(GOLDEN) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    program = bytearray(members.pop("torch_checkpoint/data.pkl"))
    program[place % len(program)] = value
    data = {each.removeprefix("torch_checkpoint/data/"): content for each, content in members.items()}
    with contextlib.suppress(FormatError):
        dict(TorchZip(write(tmp_path / "f", bytes(program), data)))


def test_zip_without_exactly_one_pickle_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        archive.writestr("readme", b"")
    with pytest.raises(MagicError, match=r"0 data\.pkl"):
        TorchZip(tmp_path / "f")
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("b/data.pkl", b"")
    with pytest.raises(MagicError, match=r"2 data\.pkl"):
        TorchZip(tmp_path / "f")


def test_big_endian_files_are_refused(tmp_path):
    assert "w" in TorchZip(write(tmp_path / "f", state_dict(w=tensor()), byteorder=b"little"))
    with pytest.raises(RefusedError, match="big-endian"):
        TorchZip(write(tmp_path / "f", state_dict(w=tensor()), byteorder=b"big"))


def test_oversized_pickle_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("llmc_cli.formats.torch_pickle.MAX_PICKLE_BYTES", 10)
    with pytest.raises(SizeError, match=r"data\.pkl"):
        TorchZip(write(tmp_path / "f", state_dict(w=tensor())))


@pytest.mark.parametrize("strides", [(4, 1), (1, 3)])
def test_access_reports_the_index_of_a_nan(tmp_path, strides):
    values = BASE.copy()
    values.reshape(-1)[11] = math.nan
    path = write(tmp_path / "f", state_dict(w=tensor((3, 4), strides)), {"0": values.tobytes()})
    with pytest.raises(NonFiniteError, match=r"nan at w\[2, 3\]"):
        TorchZip(path)["w"]


@pytest.mark.witness
def test_files_saved_by_pytorch(tmp_path):
    import torch

    state = torch.nn.TransformerDecoderLayer(8, 2, 16).state_dict()
    state["bfloat16"] = torch.randn(5, 7).to(torch.bfloat16).T
    state["view"] = torch.randn(100)[10:30:2]
    for protocol in (2, 4):
        torch.save(state, tmp_path / "f", pickle_protocol=protocol)
        found = TorchZip(tmp_path / "f")
        assert list(found) == list(state)
        for key, values in state.items():
            assert np.array_equal(found[key], values.float().numpy()), key
    torch.save(torch.nn.Linear(2, 2), tmp_path / "f")
    with pytest.raises(UnsafePickleError, match=r"torch\.nn"):
        TorchZip(tmp_path / "f")
    torch.save(state, tmp_path / "f", _use_new_zipfile_serialization=False)
    with pytest.raises(RefusedError, match=r"PyTorch before version 1\.6"):
        identify(tmp_path / "f")
