"""Debug states: reading and writing."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc_cli.formats import debug_state
from llmc_cli.formats.debug_state import DebugHeader, check_debug_state, read_debug_state, write_debug_state
from llmc_cli.formats.errors import MagicError, NonFiniteError, RangeError, SizeError, VersionError
from llmc_cli.formats.weights import TENSORS, GPT2Header, tensor_shapes

MODEL = GPT2Header(20240326, 3, 5, 7, 1, 2, 4, 9)
B, T, V, VP = 2, 3, 7, 9


def batch(seed=0, model=MODEL, b=B, t=T):
    """Return random x, y, logits, loss and gradients."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, model.vocab_size, (2, b, t)).astype(np.int32)
    logits = rng.normal(size=(b, t, model.vocab_size)).astype(np.float32)
    shapes = tensor_shapes(model._replace(version=3))
    return x, y, logits, 1.5, {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def golden(version, x, y, logits, loss, grads):
    """Return the bytes of a debug state as docs/formats.md describes it."""
    floats = [*logits.reshape(-1).tolist(), loss]
    for name in TENSORS:
        grad = grads[name][:V] if name == "wte" and version == 1 else grads[name]
        floats += grad.reshape(-1).tolist()
    ids = [*x.reshape(-1).tolist(), *y.reshape(-1).tolist()]
    header = struct.pack("<256i", 20240327, version, B, T, *[0] * 252)
    return header + struct.pack(f"<{len(ids)}i", *ids) + struct.pack(f"<{len(floats)}f", *floats)


def test_golden_bytes(tmp_path):
    content = batch()
    write_debug_state(tmp_path / "d", *content)
    assert (tmp_path / "d").read_bytes() == golden(2, *content)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("model_version", [1, 3, 5])
def test_both_versions_are_read(tmp_path, version, model_version):
    x, y, logits, loss, grads = batch()
    (tmp_path / "d").write_bytes(golden(version, x, y, logits, loss, grads))
    found = check_debug_state(tmp_path / "d", MODEL._replace(version=model_version))
    assert found.header == DebugHeader(20240327, version, B, T)
    assert np.array_equal(found.x, x)
    assert np.array_equal(found.y, y)
    assert np.array_equal(found.logits, logits)
    assert found.loss == loss
    assert tuple(found.grads) == TENSORS
    for name, grad in found.grads.items():
        assert np.array_equal(grad, grads[name][: grad.shape[0]]), name
        assert not grad.flags.writeable
    assert found.grads["wte"].shape == (V if version == 1 else VP, 4)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.tuples(*[st.integers(1, 4)] * 7), seed=st.integers(0, 2**32 - 1))
def test_round_trip(tmp_path, sizes, seed):
    b, t, v, padding, layers, heads, head_size = sizes
    model = GPT2Header(20240326, 3, 4, v, layers, heads, heads * head_size, v + padding)
    x, y, logits, loss, grads = batch(seed, model, b, t)
    write_debug_state(tmp_path / "d", x, y, logits, loss, grads)
    found = read_debug_state(tmp_path / "d", model)
    assert np.array_equal(found.x, x)
    assert np.array_equal(found.logits, logits)
    assert all(np.array_equal(found.grads[name], grads[name]) for name in TENSORS)
    assert read_debug_state(tmp_path / "d").values.size == found.values.size


def test_without_a_model_values_are_not_split(tmp_path):
    write_debug_state(tmp_path / "d", *batch())
    found = check_debug_state(tmp_path / "d")
    assert found.header == DebugHeader(20240327, 2, B, T)
    assert found.logits is None
    assert found.loss is None
    assert found.grads == {}


@pytest.mark.parametrize("change", [-1, -4, 1, 4])
@pytest.mark.parametrize("version", [1, 2])
def test_truncated_and_oversized_files_are_rejected(tmp_path, version, change):
    content = golden(version, *batch())
    (tmp_path / "d").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(SizeError):
        read_debug_state(tmp_path / "d", MODEL)
    if change % 4:
        with pytest.raises(SizeError):
            read_debug_state(tmp_path / "d")


def test_without_a_model_the_size_of_the_smallest_model_is_required(tmp_path):
    write_debug_state(tmp_path / "d", *batch())
    content = (tmp_path / "d").read_bytes()
    for size in (1024, 1028, 1024 + 8 * B * T, 1024 + 8 * B * T + 4 * (B * T * V + 1)):
        (tmp_path / "d").write_bytes(content[:size])
        with pytest.raises(SizeError):
            read_debug_state(tmp_path / "d")


def test_state_of_another_model_is_rejected(tmp_path):
    write_debug_state(tmp_path / "d", *batch())
    for other in ({"vocab_size": 6}, {"num_layers": 2}, {"padded_vocab_size": 8}, {"channels": 8}):
        with pytest.raises(SizeError):
            read_debug_state(tmp_path / "d", MODEL._replace(**other))
    with pytest.raises(RangeError, match="sequence length = 3"):
        read_debug_state(tmp_path / "d", MODEL._replace(max_seq_len=2))


@pytest.mark.parametrize(
    ("slot", "value", "error"),
    [
        (0, 20240326, MagicError),
        (1, 3, VersionError),
        (2, 0, RangeError),
        (2, -1, RangeError),
        (3, 0, RangeError),
        (2, 2**31 - 1, SizeError),
        (3, 2**31 - 1, SizeError),
    ],
)
def test_invalid_headers_are_rejected_without_allocating(tmp_path, slot, value, error):
    content = bytearray(golden(2, *batch()))
    content[4 * slot : 4 * slot + 4] = struct.pack("<i", value)
    (tmp_path / "d").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(error):
            read_debug_state(tmp_path / "d")
        with pytest.raises((error, RangeError)):
            read_debug_state(tmp_path / "d", MODEL)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("which", "token"), [("x", -1), ("x", V), ("y", V), ("y", -5)])
def test_invalid_token_ids_are_rejected(tmp_path, which, token):
    x, y, *rest = batch()
    {"x": x, "y": y}[which][1, 1] = token
    write_debug_state(tmp_path / "d", x, y, *rest)
    with pytest.raises(RangeError, match=rf"token id {token} at {which}\[4\]"):
        read_debug_state(tmp_path / "d", MODEL)
    if token < 0:
        with pytest.raises(RangeError, match=f"token id {token}"):
            read_debug_state(tmp_path / "d")


@pytest.mark.parametrize("where", ["logits", "loss", *TENSORS])
def test_check_reports_the_tensor_of_a_nan(tmp_path, where):
    x, y, logits, loss, grads = batch()
    if where == "loss":
        loss = math.inf
    else:
        (logits if where == "logits" else grads[where]).reshape(-1)[-1] = math.nan
    write_debug_state(tmp_path / "d", x, y, logits, loss, grads)
    with pytest.raises(NonFiniteError, match=rf"at {where}\["):
        check_debug_state(tmp_path / "d", MODEL)
    with pytest.raises(NonFiniteError):
        check_debug_state(tmp_path / "d")


def test_writing_mismatched_shapes_is_rejected(tmp_path):
    x, y, *rest = batch()
    with pytest.raises(ValueError, match="do not match"):
        write_debug_state(tmp_path / "d", x, y[:1], *rest)


def test_file_size_of_gpt2_124m():
    model = GPT2Header(20240326, 3, 1024, 50257, 12, 12, 768, 50304)
    assert debug_state.file_size(DebugHeader(20240327, 2, 4, 64), model) == 549_369_860
