import numpy as np
import pytest

from llmc_cli.data.batches import Position
from llmc_cli.errors import DataError, UsageError
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.files import load_model, save_model
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.initialization import initialize
from llmc_cli.rng import MersenneTwister
from llmc_cli.training.checkpoints import RunFolder, data_position, train_state
from llmc_cli.training.optimizer import AdamW

CONFIG = ModelConfig(8, 37, 1, 2, 8)


@pytest.fixture
def model(backend):
    model = GPT2(CONFIG, backend.kernels)
    initialize(model, 1)
    return model


@pytest.mark.parametrize("version", [1, 3])
def test_model_round_trip(model, backend, tmp_path, version):
    save_model(tmp_path / "m.bin", model, version)
    loaded = load_model(tmp_path / "m.bin", backend.kernels)
    assert loaded.config == CONFIG
    np.testing.assert_array_equal(loaded.params.flat, model.params.flat)


def test_reference_backend_loads_the_same_weights(model, tmp_path):
    save_model(tmp_path / "m.bin", model)
    loaded = load_model(tmp_path / "m.bin", ReferenceKernels())
    assert loaded.params.flat.dtype == np.float64
    np.testing.assert_array_equal(loaded.params.flat, model.params.flat)


def test_checkpoint_writes_its_done_file_last(model, tmp_path, monkeypatch):
    folder, optimizer = RunFolder(tmp_path), AdamW(model)
    state = train_state(3, Position(0, 5), 1, 2, 42)
    seen = []
    write_record = RunFolder.write_record
    monkeypatch.setattr(
        RunFolder,
        "write_record",
        lambda self, r: (seen.append(sorted(p.name for p in tmp_path.iterdir())), write_record(self, r)),
    )
    folder.write(3, model, optimizer, state, {"note": 1})
    assert seen == [["model_00000003.bin", "state_00000003_00000.bin"]]
    assert folder.steps() == [3]
    assert folder.read_record()["checkpoints"] == {"3": {"note": 1}}
    folder.write(4, model, optimizer, train_state(4, Position(0, 5), 1, 2, 42), {"note": 2})
    assert list(folder.read_record()["checkpoints"]) == ["3", "4"]
    folder.delete(3)
    folder.delete(3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "DONE_00000004", "model_00000004.bin", "run.json", "state_00000004_00000.bin",
    ]  # fmt: skip


def test_other_names_are_not_done_files(tmp_path):
    for name in ("DONE_1", "DONE_00000001.tmp", "xDONE_00000001", "DONE_0000000a"):
        (tmp_path / name).touch()
    assert RunFolder(tmp_path).steps() == []
    assert RunFolder(tmp_path / "missing").steps() == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 2, "checkpoints": {}}', '{"schema": 1, "checkpoints": []}', "\xff"]
)
def test_damaged_run_json_is_rejected(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"run\.json: found .*move the file away"):
        RunFolder(tmp_path).read_record()


def test_lock_excludes_other_runs_and_removes_partial_files(tmp_path):
    lock = RunFolder(tmp_path / "new").lock()
    with pytest.raises(UsageError, match="another run"):
        RunFolder(tmp_path / "new").lock()
    lock.release()
    (tmp_path / "new" / ".model_00000001.bin.x.part").write_bytes(b"half")
    RunFolder(tmp_path / "new").lock().release()
    assert [path.name for path in (tmp_path / "new").glob(".*.part")] == []


@pytest.mark.parametrize("draws", [0, 5, 624, 700])
def test_shuffled_position_round_trip(draws):
    generator = MersenneTwister(42)
    generator.words(draws)
    position = Position(1, 2, np.array([1, 0], np.int32), np.array([2, 0, 1], np.int32), generator.state)
    state = train_state(7, position, 11, 12, 42)
    assert (state.step, state.rng_state, state.rng_state_before_update) == (7, 11, 12)
    assert state.shuffle.mersenne.next == (draws % 624 or (624 if draws else 0))
    assert state.shuffle.mersenne.left == (625 - state.shuffle.mersenne.next if draws else 1)
    restored = data_position(state)
    assert (restored.shard, restored.sample) == (1, 2)
    generator_restored = MersenneTwister(1)
    generator_restored.state = restored.generator
    np.testing.assert_array_equal(generator_restored.words(10), generator.words(10))


def test_sequential_position_round_trip():
    assert data_position(train_state(7, Position(3, 4), 1, 2, 42)) == Position(3, 4)
