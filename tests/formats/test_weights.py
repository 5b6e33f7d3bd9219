"""GPT-2 model files of versions 1 to 5."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmc_cli.formats import stream, weights
from llmc_cli.formats.errors import MagicError, NonFiniteError, RangeError, RefusedError, SizeError, VersionError
from llmc_cli.formats.weights import GPT2Header, check_weights, load_weights, read_header, save_weights, tensor_shapes

T, V, L, NH, C, VP = 5, 7, 2, 2, 4, 9
LAYERS = (
    "wte", "wpe", "ln1w", "ln1b", "qkvw", "qkvb", "attprojw", "attprojb",
    "ln2w", "ln2b", "fcw", "fcb", "fcprojw", "fcprojb", "lnfw", "lnfb",
)  # fmt: skip
NORMS_LAST = (
    "wte", "wpe", "qkvw", "qkvb", "attprojw", "attprojb", "fcw", "fcb", "fcprojw", "fcprojb",
    "ln1w", "ln1b", "ln2w", "ln2b", "lnfw", "lnfb",
)  # fmt: skip
SHAPES = {
    "wte": (VP, C), "wpe": (T, C), "ln1w": (L, C), "ln1b": (L, C), "qkvw": (L, 3 * C, C), "qkvb": (L, 3 * C),
    "attprojw": (L, C, C), "attprojb": (L, C), "ln2w": (L, C), "ln2b": (L, C), "fcw": (L, 4 * C, C), "fcb": (L, 4 * C),
    "fcprojw": (L, C, 4 * C), "fcprojb": (L, C), "lnfw": (C,), "lnfb": (C,),
}  # fmt: skip


def truncated(values):
    """Clear the lower half of each float32, so that the values are exact in bfloat16."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def model(norms="trained"):
    """Return the tensors of a small model. All except the layernorms are exact in bfloat16."""
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in SHAPES.items()}
    for name in tensors:
        if not name.startswith("ln"):
            tensors[name] = truncated(tensors[name])
        elif norms == "fresh":
            tensors[name][...] = 1 if name.endswith("w") else 0
        elif name.endswith("w"):
            tensors[name] += 1
    if norms == "fresh":
        for name in ("qkvb", "attprojb", "fcb", "fcprojb"):
            tensors[name][...] = 0
    tensors["wte"][V:] = 0
    return tensors


def packed(values, bits):
    """Return the bytes of a tensor, converted independently of the package."""
    if bits == 32:
        return struct.pack(f"<{values.size}f", *values.reshape(-1).tolist())
    return b"".join(struct.pack("<f", value)[2:] for value in values.reshape(-1).tolist())


def golden(version, tensors, order=LAYERS):
    """Return the bytes of a model file as docs/formats.md describes it."""
    matrix_bits = {1: 32, 2: 16, 3: 32, 4: 16, 5: 16}[version]
    norm_bits = {1: 32, 2: 32, 3: 32, 4: 32, 5: 16}[version]
    slots = [20240326, version, T, V, L, NH, C, VP if version >= 3 else 0]
    parts = [struct.pack("<256i", *slots, *[0] * 248)]
    for name in order:
        values = tensors[name][:V] if name == "wte" and version < 3 else tensors[name]
        parts.append(packed(values, norm_bits if name.startswith("ln") else matrix_bits))
    return b"".join(parts)


def empty(rows=VP):
    return {name: np.full((rows, C) if name == "wte" else shape, np.nan, "f") for name, shape in SHAPES.items()}


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rows", [V, VP, 128])
def test_each_version_is_read(tmp_path, version, rows):
    tensors = model()
    if version == 5:
        tensors = {name: truncated(values) for name, values in tensors.items()}
    path = tmp_path / "m.bin"
    path.write_bytes(golden(version, tensors))
    into = empty(rows)
    header = load_weights(path, into)
    assert header == GPT2Header(20240326, version, T, V, L, NH, C, VP if version >= 3 else 128)
    assert check_weights(path) == header
    for name, values in tensors.items():
        if name == "wte":
            assert np.array_equal(into[name][:V], values[:V])
            assert not into[name][V:].any()
        else:
            assert np.array_equal(into[name], values), name


@pytest.mark.parametrize("version", [1, 3, 5])
def test_written_versions_match_golden_bytes_and_round_trip(tmp_path, version):
    tensors = model()
    if version == 5:
        tensors = {name: truncated(values) for name, values in tensors.items()}
    header = GPT2Header(20240326, version, T, V, L, NH, C, VP)
    save_weights(tmp_path / "a", header, tensors)
    assert (tmp_path / "a").read_bytes() == golden(version, tensors)
    into = empty(VP)
    found = load_weights(tmp_path / "a", into)
    save_weights(tmp_path / "b", found._replace(padded_vocab_size=VP), into)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_version_5_rounds_to_even(tmp_path):
    tensors = model()
    tensors["lnfw"][:] = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    save_weights(tmp_path / "m", GPT2Header(20240326, 5, T, V, L, NH, C, VP), tensors)
    assert (tmp_path / "m").read_bytes()[-4 * C : -2 * C] == struct.pack("<4H", 0x3F80, 0x3F82, 0x3F81, 0x3F80)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    version=st.sampled_from([1, 3, 5]),
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    heads=st.integers(1, 3),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_round_trips(tmp_path, version, sizes, heads, padding, seed):
    t, v, layers, head_size = sizes
    padded = v + padding if version > 1 else -(-v // 128) * 128
    header = GPT2Header(20240326, version, t, v, layers, heads, heads * head_size, padded)
    shapes = tensor_shapes(header._replace(version=3))
    rng = np.random.default_rng(seed)
    tensors = {name: (rng.normal(0, 1, s) * 10.0 ** rng.integers(-38, 38, s)).astype("f") for name, s in shapes.items()}
    save_weights(tmp_path / "a", header, tensors)
    into = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    assert load_weights(tmp_path / "a", into) == header
    save_weights(tmp_path / "b", header, into)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    if version == 3:
        assert all(np.array_equal(into[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("norms", ["trained", "fresh"])
@pytest.mark.parametrize(("name", "order"), [("layers", LAYERS), ("norms last", NORMS_LAST)])
def test_order_of_version_2_is_detected(tmp_path, norms, name, order):
    tensors = model(norms)
    (tmp_path / "m").write_bytes(golden(2, tensors, order))
    assert weights.find_order(tmp_path / "m", read_header(tmp_path / "m")) == name
    for forced in (None, name):
        into = empty()
        load_weights(tmp_path / "m", into, order=forced)
        assert all(np.array_equal(into[each], tensors[each]) for each in LAYERS)


def test_order_of_version_2_can_be_forced(tmp_path):
    tensors = model("fresh")
    (tmp_path / "m").write_bytes(golden(2, tensors, NORMS_LAST))
    into = empty()
    load_weights(tmp_path / "m", into, order="layers")
    assert not np.array_equal(into["ln1w"], tensors["ln1w"])


def test_version_2_file_that_fits_both_orders_is_refused(tmp_path):
    zeros = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    (tmp_path / "m").write_bytes(golden(2, zeros))
    with pytest.raises(RefusedError, match="llmc convert --order layers"):
        check_weights(tmp_path / "m")
    check_weights(tmp_path / "m", order="layers")


def test_files_of_the_short_lived_branch_are_refused(tmp_path):
    content = bytearray(golden(1, model(), NORMS_LAST))
    content[4:8] = struct.pack("<i", 2)
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(RefusedError, match="short-lived branch"):
        read_header(tmp_path / "m")
    content = bytearray(golden(2, model(), NORMS_LAST))
    content[4:8] = struct.pack("<i", 3)
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(RefusedError, match=r"slot 7.*short-lived branch"):
        read_header(tmp_path / "m")


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("change", [-1, 1, -1000, 4])
def test_truncated_and_oversized_files_are_rejected(tmp_path, version, change):
    content = golden(version, model())
    (tmp_path / "m").write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(SizeError):
        load_weights(tmp_path / "m", empty())


@pytest.mark.parametrize(
    ("slot", "value", "error"),
    [
        (0, 20240803, MagicError),
        (1, 6, VersionError),
        (2, 0, RangeError),
        (2, -1, RangeError),
        (3, 0, RangeError),
        (4, 0, RangeError),
        (5, 0, RangeError),
        (5, 3, RangeError),
        (6, 0, RangeError),
        (6, -4, RangeError),
        (7, V - 1, RangeError),
        (7, -1, RangeError),
        (7, VP + 1, SizeError),
        (4, 2**31 - 1, SizeError),
        (6, 2**31 - 2, SizeError),
    ],
)
def test_invalid_headers_are_rejected(tmp_path, slot, value, error):
    content = bytearray(golden(3, model()))
    content[4 * slot : 4 * slot + 4] = struct.pack("<i", value)
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(error):
        read_header(tmp_path / "m")


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_extreme_headers_are_rejected_without_allocating(tmp_path, version):
    (tmp_path / "m").write_bytes(struct.pack("<256i", 20240326, version, *[2**31 - 1] * 6, *[0] * 248))
    tracemalloc.start()
    try:
        with pytest.raises(SizeError):
            check_weights(tmp_path / "m")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_and_load_report_the_index_of_nan_and_inf(tmp_path, name, value):
    for version in (3, 5):
        tensors = model()
        tensors[name].reshape(-1)[-1] = value
        place = ", ".join(str(length - 1) for length in SHAPES[name])
        (tmp_path / "m").write_bytes(golden(version, tensors))
        for check in (check_weights, lambda path: load_weights(path, empty())):
            with pytest.raises(NonFiniteError, match=rf"{value} at {name}\[{place}\]"):
                check(tmp_path / "m")


def test_dropped_padding_is_checked_for_nan(tmp_path):
    tensors = model()
    tensors["wte"][VP - 1, 0] = math.nan
    (tmp_path / "m").write_bytes(golden(3, tensors))
    with pytest.raises(NonFiniteError, match="wte"):
        load_weights(tmp_path / "m", empty(V))


def test_invalid_models_are_not_written(tmp_path):
    header = GPT2Header(20240326, 3, T, V, L, NH, C, VP)
    for version in (0, 2, 4, 6):
        with pytest.raises(VersionError, match="1, 3, 5"):
            save_weights(tmp_path / "m", header._replace(version=version), model())
    with pytest.raises(RangeError):
        save_weights(tmp_path / "m", header._replace(num_heads=3), model())
    with pytest.raises(ValueError, match="wpe"):
        save_weights(tmp_path / "m", header, model() | {"wpe": np.zeros((T + 1, C), np.float32)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [np.zeros((T + 1, C), np.float32), np.zeros((T, C)), np.zeros((C, T), np.float32).T, np.zeros(C, "f")]
)
def test_loading_into_arrays_of_other_shapes_raises(tmp_path, wrong):
    (tmp_path / "m").write_bytes(golden(3, model()))
    with pytest.raises(ValueError, match="wpe"):
        load_weights(tmp_path / "m", empty() | {"wpe": wrong})
    with pytest.raises(ValueError, match="wte"):
        load_weights(tmp_path / "m", empty(V - 1))


def test_loading_and_saving_allocate_a_few_chunks_only(tmp_path):
    header = GPT2Header(20240326, 5, 1, 1, 1, 1, 1024, 128)
    tensors = {name: np.ones(shape, np.float32) for name, shape in tensor_shapes(header).items()}
    tracemalloc.start()
    try:
        for version in (5, 3):
            save_weights(tmp_path / "m", header._replace(version=version), tensors)
            load_weights(tmp_path / "m", tensors)
        assert sum(values.nbytes for values in tensors.values()) > 48 << 20
        assert tracemalloc.get_traced_memory()[1] < 24 * stream.CHUNK
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("version", "size"), [(3, 497_904_640), (5, 248_952_832)])
def test_file_size_of_gpt2_124m(version, size):
    assert weights.file_size(GPT2Header(20240326, version, 1024, 50257, 12, 12, 768, 50304)) == size
