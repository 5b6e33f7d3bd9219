"""safetensors files, sharded checkpoints and model folders."""

import contextlib
import json
import math
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support.paths import FIXTURES

from llmc_cli.formats import stream
from llmc_cli.formats.errors import FormatError, MagicError, NonFiniteError, RangeError, SizeError
from llmc_cli.formats.safetensors import SafetensorsFile, open_checkpoint, open_tensors, write_safetensors
from llmc_cli.formats.tensors import TensorInfo

TORCH_CHECKPOINT = FIXTURES / "torch_checkpoint.bin"


def file_of(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOLDEN = file_of(
    {
        "__metadata__": {"format": "pt"},
        "b": entry("BF16", [2], 8, 12),
        "a": entry("F32", [1, 2], 0, 8),
        "h": entry("F16", [2, 1], 12, 16),
        "i": entry("I64", [], 16, 24),
        "mask": entry("BOOL", [1, 1, 2], 24, 26),
        "none": entry("F32", [0, 3], 26, 26),
    },
    struct.pack("<2f2H2eq2?", 1.5, -2, 0x3F80, 0xC000, 0.5, -4, -7, True, False),
)


def test_read_golden_file(tmp_path):
    (tmp_path / "f").write_bytes(GOLDEN)
    found = SafetensorsFile(tmp_path / "f")
    assert found.info["b"] == TensorInfo("bfloat16", (2,))
    assert {name: values.tolist() for name, values in found.items()} == {
        "b": [1, -2],
        "a": [[1.5, -2]],
        "h": [[0.5], [-4]],
        "i": -7,
        "mask": [[[True, False]]],
        "none": [],
    }
    assert [found[name].dtype for name in ("a", "b", "h")] == [np.float32] * 3
    assert not found["a"].flags.writeable
    assert len(found) == 6
    assert "c" not in found


def test_write_golden_bytes(tmp_path):
    tensors = {"b": np.array([[1, 2], [3, 4]], np.float32).T, "a": np.array(0.5, np.float32)}
    for dtype, code, size, body in (
        ("float32", "F32", 4, struct.pack("<5f", 1, 3, 2, 4, 0.5)),
        ("bfloat16", "BF16", 2, struct.pack("<5H", 0x3F80, 0x4040, 0x4000, 0x4080, 0x3F00)),
    ):
        write_safetensors(tmp_path / "f", tensors, dtype)
        text = (
            f'{{"__metadata__":{{"format":"pt"}},"b":{{"dtype":"{code}","shape":[2,2],"data_offsets":[0,{4 * size}]}},'
            f'"a":{{"dtype":"{code}","shape":[],"data_offsets":[{4 * size},{5 * size}]}}}}'
        ).encode()
        text += b" " * (-len(text) % 8)
        assert (tmp_path / "f").read_bytes() == struct.pack("<Q", len(text)) + text + body


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
tensors = st.dictionaries(
    st.text(max_size=5).filter(lambda name: name != "__metadata__"),
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, min_side=0, max_side=4), elements=finite),
    max_size=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors)
def test_round_trip_matches_the_safetensors_library(tmp_path, tensors):
    write_safetensors(tmp_path / "f", tensors)
    found, library = SafetensorsFile(tmp_path / "f"), safetensors.numpy.load_file(tmp_path / "f")
    assert list(found) == list(tensors)
    for name, values in tensors.items():
        assert found[name].shape == values.shape
        assert found[name].tobytes() == values.tobytes() == library[name].tobytes()


def test_read_files_of_the_safetensors_library(tmp_path):
    expected = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.arange(3), "h": np.ones(2, np.float16)}
    safetensors.numpy.save_file(expected, tmp_path / "f")
    found = SafetensorsFile(tmp_path / "f")
    assert {name: values.tolist() for name, values in found.items()} == {k: v.tolist() for k, v in expected.items()}


A = entry("F32", [2], 0, 8)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", SizeError),
        (b"\x02\0\0\0\0\0\0", SizeError),
        (struct.pack("<Q", 3) + b"{}", SizeError),
        (struct.pack("<Q", 2**64 - 1) + b"{}", SizeError),
        (file_of(b"{"), RangeError),
        (file_of(b"[]"), RangeError),
        (file_of(b"\xff{}"), RangeError),
        (file_of(b"[" * 100_000), RangeError),
        (file_of(b'{"a":' * 50_000), RangeError),
        (file_of(b'{"a":1' + b"0" * 5000 + b"}"), RangeError),
        (file_of(f'{{"a":{json.dumps(A)},"a":{json.dumps(A)}}}'.encode(), bytes(8)), RangeError),
        (file_of({"a": 1}), RangeError),
        (file_of({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)), RangeError),
        (file_of({"a": entry("F32", [2.0], 0, 8)}, bytes(8)), RangeError),
        (file_of({"a": entry("F32", [True, 2], 0, 8)}, bytes(8)), RangeError),
        (file_of({"a": entry("F32", [-2], 0, 8)}, bytes(8)), RangeError),
        (file_of({"a": entry("F32", [2], -8, 0)}, bytes(8)), RangeError),
        (file_of({"a": entry("F64", [1], 0, 8)}, bytes(8)), RangeError),
        (file_of({"a": entry("F32", [3], 0, 8)}, bytes(8)), SizeError),
        (file_of({"a": entry("F32", [2], 8, 0)}, bytes(8)), SizeError),
        (file_of({"a": entry("F32", [2**40, 2**40], 0, 8)}, bytes(8)), SizeError),
        (file_of({"a": entry("F32", [2**40], 0, 2**42)}, bytes(8)), SizeError),
        (file_of({"a": A, "b": entry("F32", [2], 4, 12)}, bytes(12)), SizeError),
        (file_of({"a": A, "b": A}, bytes(8)), SizeError),
        (file_of({"a": A, "b": entry("F32", [2], 12, 20)}, bytes(20)), SizeError),
        (file_of({"a": entry("F32", [2], 4, 12)}, bytes(12)), SizeError),
        (file_of({"a": A}, bytes(7)), SizeError),
        (file_of({"a": A}, bytes(9)), SizeError),
    ],
)
def test_damaged_files_are_rejected_without_allocating(tmp_path, content, error):
    (tmp_path / "f").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error):
            SafetensorsFile(tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, len(GOLDEN) - 1), st.integers(0, 255))
def test_any_damaged_byte_raises_format_error_or_nothing(tmp_path, place, value):
    (tmp_path / "f").write_bytes(GOLDEN[:place] + bytes([value]) + GOLDEN[place + 1 :])
    with contextlib.suppress(FormatError):
        dict(SafetensorsFile(tmp_path / "f"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_access_reports_the_index_of_a_nan(tmp_path, dtype, value):
    values = np.zeros((2, 3), np.float32)
    values[1, 2] = value
    write_safetensors(tmp_path / "f", {"w": values}, dtype)
    with pytest.raises(NonFiniteError, match=rf"{value} at w\[1, 2\]"):
        SafetensorsFile(tmp_path / "f")["w"]


def test_float32_tensor_is_memory_mapped(tmp_path):
    write_safetensors(tmp_path / "f", {"w": np.zeros((20, stream.CHUNK), np.float32)})
    tracemalloc.start()
    try:
        assert SafetensorsFile(tmp_path / "f")["w"].shape == (20, stream.CHUNK)
        assert tracemalloc.get_traced_memory()[1] < 4 * stream.CHUNK
    finally:
        tracemalloc.stop()


def sharded(folder, weight_map, index="model.safetensors.index.json"):
    write_safetensors(folder / "one.safetensors", {"a": np.ones(2, np.float32)})
    write_safetensors(folder / "two.safetensors", {"b": np.zeros(3, np.float32), "c": np.ones(1, np.float32)})
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 24}, "weight_map": weight_map}))
    return folder


WHOLE = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_sharded_checkpoint(tmp_path, index):
    found = open_checkpoint(sharded(tmp_path, WHOLE, index))
    assert {name: values.tolist() for name, values in found.items()} == {"a": [1, 1], "b": [0, 0, 0], "c": [1]}
    assert found.info["b"] == TensorInfo("float32", (3,))


def test_sharded_pytorch_checkpoint(tmp_path):
    shutil.copy(TORCH_CHECKPOINT, tmp_path / "part.bin")
    found = open_checkpoint(sharded(tmp_path, {"scalar": "part.bin"} | WHOLE, "pytorch_model.bin.index.json"))
    assert found["scalar"] == 7
    assert found["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("weight_map", "error"),
    [
        ({}, RangeError),
        ([], RangeError),
        ({"a": 1}, RangeError),
        ({"a": "../one.safetensors"}, RangeError),
        ({"a": "/etc/passwd"}, RangeError),
        ({"a": "..\\one.safetensors"}, RangeError),
        ({"a": "C:one.safetensors"}, RangeError),
        ({"a": ".."}, RangeError),
        ({"a": ""}, RangeError),
        ({"b": "one.safetensors"}, RangeError),
        ({"a": "three.safetensors"}, FileNotFoundError),
        ({"a": "model.safetensors.index.json"}, MagicError),
    ],
)
def test_invalid_indexes_are_rejected(tmp_path, weight_map, error):
    with pytest.raises(error):
        open_checkpoint(sharded(tmp_path, weight_map))


def test_index_with_invalid_json_is_rejected(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("nonsense")
    with pytest.raises(RangeError, match="invalid JSON"):
        open_checkpoint(tmp_path)


def test_checkpoint_files_are_searched_in_order(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no weights"):
        open_checkpoint(tmp_path)
    shutil.copy(TORCH_CHECKPOINT, tmp_path / "pytorch_model.bin")
    assert "scalar" in open_checkpoint(tmp_path)
    sharded(tmp_path, WHOLE)
    assert "b" in open_checkpoint(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", {"single": np.ones(1, np.float32)})
    assert list(open_checkpoint(tmp_path)) == ["single"]
    assert list(open_tensors(tmp_path / "model.safetensors")) == ["single"]


@pytest.mark.witness
def test_pytorch_reads_written_files(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    values = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    for dtype, torch_dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        write_safetensors(tmp_path / "f", {"w": values.T}, dtype)
        expected = torch.from_numpy(values.T.copy()).to(torch_dtype)
        assert torch.equal(load_file(tmp_path / "f")["w"], expected)
        save_file({"w": expected}, tmp_path / "g")
        assert np.array_equal(SafetensorsFile(tmp_path / "g")["w"], expected.float().numpy())
