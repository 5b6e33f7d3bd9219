"""Identification and checks of files and folders."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from support.evalsets import write_evalset
from support.paths import TINY_GPT2

from llmc_cli.formats.evalset import Example
from llmc_cli.formats.header import HEADER_BYTES
from llmc_cli.formats.registry import Kind
from llmc_cli.formats.safetensors import write_safetensors
from llmc_cli.formats.shard import write_shard
from llmc_cli.formats.train_state import Mersenne, Shuffle, TrainState, write_train_state
from llmc_cli.formats.vocabulary import write_vocabulary
from llmc_cli.verification.file_checks import check_file, check_files

PARAMETERS = 9024  # of the golden model, including padding
SHAPE = {"T": 24, "V": 97, "Vp": 128, "L": 2, "NH": 2, "C": 16}


def overwrite(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        file.write(content)


def train_state(path, parameters=PARAMETERS, step=5, processes=1, rank=0, shuffled=False):
    shuffle = None
    if shuffled:
        words = np.arange(624, dtype=np.uint32)
        shuffle = Shuffle(np.arange(2, dtype=np.int32), np.arange(3, dtype=np.int32), Mersenne(42, 1, 0, words))
    state = TrainState(processes, rank, step, 1, 1, 0, 2, shuffle)
    moments = np.ones(parameters, np.float32)
    write_train_state(path, state, moments, moments)
    return path


def run_folder(tmp_path, processes=1):
    """Create a run folder with complete checkpoints of steps 5 and 10 and an incomplete one of step 15."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (5, 10, 15):
        shutil.copy(TINY_GPT2 / "model.bin", folder / f"model_{step:08d}.bin")
        for rank in range(processes):
            parameters = PARAMETERS // processes
            train_state(folder / f"state_{step:08d}_{rank:05d}.bin", parameters, step, processes, rank)
    for step in (5, 10):
        (folder / f"DONE_{step:08d}").touch()
    (folder / "model_00000015.bin").write_bytes(b"half")
    return folder


def test_model():
    report = check_file(TINY_GPT2 / "model.bin")
    assert (report.kind, report.version, report.error) == ("GPT-2 model", 3, None)
    assert report.facts == {**SHAPE, "parameters": PARAMETERS, "dtype": "float32"}
    report = check_file(TINY_GPT2 / "model_bf16.bin")
    assert (report.version, report.facts["dtype"], report.error) == (5, "bfloat16", None)


@pytest.mark.parametrize(("name", "item"), [("model.bin", 4), ("model_bf16.bin", 2)])
def test_nonzero_padding_is_rejected(tmp_path, name, item):
    path = Path(shutil.copy(TINY_GPT2 / name, tmp_path))
    offset = HEADER_BYTES + item * (97 * 16 + 16)
    overwrite(path, offset + item - 1, b"\x80")  # -0
    assert check_file(path).error is None
    overwrite(path, offset, b"\x01")
    assert "row 98 of wte" in check_file(path).error


def test_model_with_nan_is_rejected(tmp_path):
    path = Path(shutil.copy(TINY_GPT2 / "model.bin", tmp_path))
    overwrite(path, -4, struct.pack("<f", np.nan))
    assert "nan at lnfb[15]" in check_file(path).error


def test_debug_state_with_and_without_model(tmp_path):
    path = TINY_GPT2 / "debug_state.bin"
    alone = check_file(path)
    assert (alone.kind, alone.version, alone.error) == ("GPT-2 debug state", 2, None)
    assert alone.facts == {"B": 2, "T": 16, "min id": 4, "max id": 93, "values": 2 * 16 * 97 + 1 + PARAMETERS}
    _, with_model = check_files([TINY_GPT2 / "model.bin", path])
    assert with_model.facts["loss"] == pytest.approx(4.844018528)
    longer = tmp_path / "longer.bin"
    longer.write_bytes(path.read_bytes() + bytes(4))  # valid for some other model
    assert check_file(longer).error is None
    _, with_model = check_files([TINY_GPT2 / "model.bin", longer])
    assert "the file has extra bytes at the end" in with_model.error


@pytest.mark.parametrize(("kind", "name", "vocab_size"), [
    (Kind.SHARD_GPT2, "GPT-2 token shard", 50257), (Kind.SHARD_LLAMA3, "Llama 3 token shard", 128256),
])  # fmt: skip
def test_shards(tmp_path, kind, name, vocab_size):
    path = tmp_path / "shard.bin"
    write_shard(path, [7, vocab_size - 1, 30], kind)
    report = check_file(path)
    assert (report.kind, report.error) == (name, None)
    assert report.facts == {"tokens": 3, "min id": 7, "max id": vocab_size - 1}
    write_shard(path, [7, vocab_size], kind)
    assert f"token id {vocab_size} at tokens[1]" in check_file(path).error
    write_shard(path, [], kind)
    assert check_file(path).facts == {"tokens": 0}


def test_model_determines_the_vocabulary_of_a_shard(tmp_path):
    path = tmp_path / "shard.bin"
    write_shard(path, [3, 97])
    model = TINY_GPT2 / "model.bin"
    assert "token id 97 at tokens[1], expected 0 to 96" in next(check_files([path, model])).error
    two_models = [model, TINY_GPT2 / "model_bf16.bin"]  # ambiguous, so neither is used
    assert next(check_files([path, *two_models])).error is None
    assert next(check_files([path, tmp_path / "none.bin"])).error is None


def test_evaluation_set(tmp_path):
    path = tmp_path / "set.bin"
    ids = np.array([1, 2], np.uint16)
    write_evalset(path, [Example(ids, [ids] * 4, 0, 0)] * 3)
    report = check_file(path)
    assert (report.kind, report.facts["examples"], report.error) == ("evaluation set", 3, None)
    overwrite(path, -2, (50257).to_bytes(2, "little"))
    assert "token id 50257" in check_file(path).error


def test_tokenizer_table(tmp_path):
    path = tmp_path / "table.bin"
    write_vocabulary(path, [b"a", b"bcd", b""], 2)
    report = check_file(path)
    assert (report.kind, report.version, report.error) == ("tokenizer table", 2, None)
    assert report.facts == {"tokens": 3, "end of text": 2, "longest token": "3 bytes"}


@pytest.mark.parametrize("shuffled", [False, True])
def test_training_state_with_and_without_model(tmp_path, shuffled):
    model = TINY_GPT2 / "model.bin"
    path = train_state(tmp_path / "state.bin", shuffled=shuffled)
    for report in (check_file(path), list(check_files([model, path]))[1]):
        assert report.error is None
        assert (report.facts["step"], report.facts["parameters"]) == (5, PARAMETERS)
        assert report.facts.get("samples in shard") == (3 if shuffled else None)
    path = train_state(tmp_path / "other.bin", PARAMETERS - 1, shuffled=shuffled)
    assert check_file(path).error is None
    assert "found 9,023 parameters, expected 9,024" in list(check_files([model, path]))[1].error
    overwrite(path, HEADER_BYTES + 8, struct.pack("<f", np.inf))
    assert "inf at m[2]" in check_file(path).error


def test_training_state_of_a_zero_partition(tmp_path):
    """All tensors of the model are divisible by 2. Some, such as lnfb with 16 values, are not divisible by 32."""
    model = TINY_GPT2 / "model.bin"
    for processes, parameters in ((2, PARAMETERS // 2), (2, PARAMETERS), (32, 282 + 8 * 15 + 4 * 15 + 31 // 2)):
        path = train_state(tmp_path / "state.bin", parameters, processes=processes)
        error = list(check_files([model, path]))[1].error
        assert (error is None) == (processes == 2)


def test_tensor_files_and_folders():
    for folder, tensors in (("safetensors", 28), ("pytorch", 29)):
        report = check_file(
            next(path for path in (TINY_GPT2 / folder).iterdir() if path.name.endswith(("tensors", "bin")))
        )
        assert (report.facts["tensors"], report.facts["dtypes"], report.error) == (tensors, "float32", None)
        (found,) = check_files([TINY_GPT2 / folder])
        assert (found.kind, found.facts["model"], found.error) == (
            "Hugging Face folder",
            "gpt2",
            None,
        )
        assert found.facts["tensors"] == tensors


def test_nonfinite_tensor_is_rejected(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w": np.array([[1.0, np.inf]], np.float32)})
    assert "inf at w[0, 1]" in check_file(tmp_path / "model.safetensors").error
    assert "inf at w[0, 1]" in next(check_files([tmp_path])).error


@pytest.mark.parametrize("text", ["{", "[1]", "7"])
def test_folder_with_invalid_config_is_rejected(tmp_path, text):
    write_safetensors(tmp_path / "model.safetensors", {"w": np.ones(1, np.float32)})
    assert next(check_files([tmp_path])).error is None
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in next(check_files([tmp_path])).error


def test_folder_without_weights_is_rejected(tmp_path):
    assert "a folder without weights" in next(check_files([tmp_path])).error


@pytest.mark.parametrize("processes", [1, 2])
def test_run_folder(tmp_path, processes):
    reports = list(check_files([run_folder(tmp_path, processes)]))
    assert [report.error for report in reports] == [None] * (2 * (1 + processes))
    assert [report.facts.get("step") for report in reports] == [None, *[5] * processes, None, *[10] * processes]


def test_run_folder_with_missing_and_wrong_files_is_rejected(tmp_path):
    folder = run_folder(tmp_path)
    (folder / "model_00000005.bin").unlink()
    shutil.copy(folder / "state_00000005_00000.bin", folder / "state_00000010_00000.bin")
    model5, state5, model10, state10 = check_files([folder])
    assert "No such file" in model5.error
    assert (state5.error, model10.error) == (None, None)
    assert state10.error.endswith("found step 5 and 1 processes, expected step 10 and 1 processes")
    (folder / "state_00000010_00000.bin").unlink()
    assert "No such file" in list(check_files([folder]))[3].error


def test_run_folder_without_the_state_of_a_process_is_rejected(tmp_path):
    folder = run_folder(tmp_path, 2)
    (folder / "state_00000010_00001.bin").unlink()
    assert [report.error is None for report in check_files([folder])] == [True] * 4 + [False]


def test_run_folder_with_state_of_another_model_is_rejected(tmp_path):
    folder = run_folder(tmp_path)
    train_state(folder / "state_00000010_00000.bin", 9000, 10)
    assert "found 9,000 parameters" in list(check_files([folder]))[3].error


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"some text, and nothing else", bytes(5000), b"PK\x03\x04" + bytes(50)]
)
def test_error_for_unknown_files_lists_the_known_kinds(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    report = check_file(path)
    assert report.kind is None
    assert "one of: GPT-2 token shard, Llama 3 token shard" in report.error
    assert "Hugging Face folder" in report.error


def test_kinds_without_a_reader_are_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"GGUF" + bytes(100))
    assert "found a GGUF file, expected a supported file format" in check_file(path).error


def test_missing_file(tmp_path):
    assert check_file(tmp_path / "none").error == f"{tmp_path / 'none'}: No such file or directory"


@pytest.mark.parametrize("name", ["model.bin", "model_bf16.bin", "debug_state.bin"])
def test_truncated_files_and_changed_headers_are_rejected(tmp_path, name):
    content = (TINY_GPT2 / name).read_bytes()
    path = tmp_path / name
    model = TINY_GPT2 / "model.bin"
    for size in (0, 3, 4, 1023, 1024, len(content) - 2, len(content) - 1, len(content) + 1):
        path.write_bytes((content + b"\0")[:size])
        assert next(check_files([path, model] if name == "debug_state.bin" else [path])).error is not None
    for slot in range(8 if name.startswith("model") else 4):
        for value in (-1, 0, 1 << 30):
            path.write_bytes(content[: 4 * slot] + struct.pack("<i", value) + content[4 * slot + 4 :])
            assert next(check_files([path, model] if name == "debug_state.bin" else [path])).error is not None


def test_facts_are_valid_json(tmp_path):
    for report in check_files(
        [TINY_GPT2 / "model.bin", TINY_GPT2 / "debug_state.bin", train_state(tmp_path / "s.bin")]
    ):
        json.dumps(report.facts, allow_nan=False)
