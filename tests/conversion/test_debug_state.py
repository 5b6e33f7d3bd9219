"""Computation of debug states by the reference implementations."""

import numpy as np
import pytest
from support.converting import MODEL, STATE, convert, transformers_model

from llmc_cli.conversion import debug_state
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.debug_state import read_debug_state
from llmc_cli.formats.errors import RangeError
from llmc_cli.formats.shard import write_shard
from llmc_cli.formats.weights import read_header


@pytest.fixture
def shard(tmp_path):
    """A shard with the tokens of the tiny model's debug state."""
    state = read_debug_state(STATE)
    tokens = np.append(state.x.reshape(-1), state.y[-1, -1])
    write_shard(tmp_path / "shard.bin", tokens)
    return tmp_path / "shard.bin"


def test_debug_state_matches_golden_file(tmp_path, shard):
    convert(MODEL, debug_state=tmp_path / "state.bin", batch=2, seq_len=16, data=shard, reference="numpy")
    found, golden = (read_debug_state(path, read_header(MODEL)) for path in (tmp_path / "state.bin", STATE))
    np.testing.assert_array_equal(found.x, golden.x)
    np.testing.assert_array_equal(found.y, golden.y)
    np.testing.assert_allclose(found.logits, golden.logits, rtol=0, atol=1e-6)
    assert found.loss == pytest.approx(golden.loss, rel=1e-6)
    for name, values in golden.grads.items():
        np.testing.assert_allclose(found.grads[name], values, rtol=0, atol=1e-7)


def test_invalid_batches_are_rejected(tmp_path, shard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "state.bin"
    with pytest.raises(UsageError, match="context of 24 tokens"):
        convert(MODEL, debug_state=state, seq_len=25, data=shard)
    with pytest.raises(DataError, match="33 tokens, expected 97"):
        convert(MODEL, debug_state=state, data=shard)
    with pytest.raises(UsageError, match="--data"):
        convert(MODEL, debug_state=state)
    write_shard(tmp_path / "large.bin", np.full(100, 97))
    with pytest.raises(RangeError, match="97"):
        convert(MODEL, debug_state=state, data=tmp_path / "large.bin")
    assert not state.exists()


def test_torch_reference_needs_pytorch(tmp_path, shard, monkeypatch):
    monkeypatch.setattr(debug_state.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install torch"):
        convert(MODEL, debug_state=tmp_path / "state.bin", data=shard, reference="torch")
    assert debug_state.choose_reference(None) == "numpy"


@pytest.mark.witness
def test_torch_and_numpy_references_agree(tmp_path, shard):
    transformers_model(seed=9).save_pretrained(tmp_path / "saved")
    states = []
    for reference in ("torch", "numpy"):
        path = tmp_path / f"{reference}.bin"
        options = {"batch": 2, "seq_len": 16, "data": shard, "reference": reference}
        convert(tmp_path / "saved", tmp_path / "model.bin", debug_state=path, **options)
        states.append(read_debug_state(path, read_header(tmp_path / "model.bin")))
    by_torch, by_numpy = states
    np.testing.assert_allclose(by_torch.logits, by_numpy.logits, rtol=0, atol=1e-6)
    assert by_torch.loss == pytest.approx(by_numpy.loss, rel=1e-6)
    for name, values in by_numpy.grads.items():
        np.testing.assert_allclose(by_torch.grads[name], values, rtol=0, atol=1e-7)
