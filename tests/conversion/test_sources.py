"""Sources of a conversion that are rejected."""

import json

import numpy as np
import pytest
from support.converting import MODEL, convert
from support.paths import TINY_GPT2

from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.errors import FormatError, NonFiniteError


def test_order_is_rejected_for_other_sources(tmp_path):
    with pytest.raises(UsageError, match="version 3"):
        convert(MODEL, tmp_path / "new.bin", order="layers")
    with pytest.raises(UsageError, match="--order"):
        convert(TINY_GPT2 / "safetensors", tmp_path / "new.bin", order="layers")


def add_tensors(**new):
    return lambda tensors: tensors | {f"transformer.{name.replace('__', '.')}": v for name, v in new.items()}


BAD_FOLDERS = {
    "another head": (lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1}, "only a tied head"),
    "unknown": (
        add_tensors(h__0__attn__extra=np.zeros(3, np.float32)),
        r"transformer\.h\.0\.attn\.extra, which a GPT-2",
    ),
    "one layer too many": (
        add_tensors(h__2__ln_1__bias=np.zeros(16, np.float32)),
        r"found transformer\.h\.2\.ln_1\.bias",
    ),
    "missing": (lambda t: {name: v for name, v in t.items() if ".h.1." not in name}, "lack h.1.*and 9 more"),
    "both names": (lambda t: {**t, "wpe.weight": t["transformer.wpe.weight"]}, "found both wpe.weight"),
    "shape": (add_tensors(wpe__weight=np.zeros((23, 16), np.float32)), r"wpe.weight is \(23, 16\).*\(24, 16\)"),
    "not transposed": (
        lambda t: {name: v.T if "c_fc.weight" in name else v for name, v in t.items()},
        r"c_fc.weight is \(64, 16\).*\(16, 64\)",
    ),
    "head's shape": (lambda t: {**t, "lm_head.weight": np.zeros((96, 16), np.float32)}, "lm_head.weight is"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_mismatched_tensors_are_rejected(tmp_path, rewrite_tensors, case):
    change, message = BAD_FOLDERS[case]
    with pytest.raises(DataError, match=message):
        convert(rewrite_tensors(change), tmp_path / "tiny.bin")
    assert not (tmp_path / "tiny.bin").exists()


def test_extreme_config_is_rejected_without_allocating(tmp_path, tiny_folder):
    config = json.loads((tiny_folder / "config.json").read_bytes())
    for change, message in (({"n_layer": 10**9}, "cannot be 1,000,000,000 layers"), ({"n_positions": 10**12}, "wpe")):
        (tiny_folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=message):
            convert(tiny_folder, tmp_path / "tiny.bin")


def test_integer_weights_are_rejected(tmp_path, tiny_folder):
    path = tiny_folder / "model.safetensors"
    content = path.read_bytes()
    at = content.index(b'"F32"', content.index(b"transformer.wpe.weight"))
    path.write_bytes(content[:at] + b'"I32"' + content[at + 5 :])
    with pytest.raises(DataError, match=r"wpe.weight is int32"):
        convert(tiny_folder, tmp_path / "tiny.bin")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_rejected(tmp_path, rewrite_tensors, value):
    def change(tensors):
        tensors["transformer.h.1.mlp.c_proj.weight"][5, 3] = value

    with pytest.raises(NonFiniteError, match=r"h\.1\.mlp\.c_proj\.weight\[5, 3\]"):
        convert(rewrite_tensors(change), tmp_path / "tiny.bin")


def test_invalid_model_folders_are_rejected(tmp_path, tiny_folder):
    with pytest.raises(DataError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "tiny.bin")
    config = json.loads((tiny_folder / "config.json").read_bytes())
    (tiny_folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(MissingError, match="model_type llama, which is not supported yet"):
        convert(tiny_folder, tmp_path / "tiny.bin")
    (tiny_folder / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(DataError, match="relu"):
        convert(tiny_folder, tmp_path / "tiny.bin")
    (tiny_folder / "config.json").write_text("[]")
    with pytest.raises(DataError):
        convert(tiny_folder, tmp_path / "tiny.bin")
    (tiny_folder / "config.json").write_text(json.dumps(config))
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        convert(tiny_folder, tmp_path / "tiny.bin")


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (b"GGUF\3\0\0\0", MissingError, "GGUF file, which is not supported yet"),
        (np.array([20240803, 3], "<i4").tobytes(), MissingError, "Llama 3 model, which is not supported yet"),
        (np.array([0x616B3432, 1], "<i4").tobytes(), MissingError, "llama2.c model, which is not supported yet"),
        (np.array([20240520, 1], "<i4").tobytes(), DataError, "GPT-2 token shard, expected a GPT-2 model"),
        (b"hello, world", FormatError, r"a GPT-2 model file \(\.bin\) or a Hugging Face model folder"),
    ],
)
def test_other_files_are_rejected(tmp_path, start, error, message):
    path = tmp_path / "other.bin"
    path.write_bytes(start + bytes(2048))
    with pytest.raises(error, match=message):
        convert(path, tmp_path / "tiny.bin")


def test_weight_file_without_config_is_rejected(tmp_path):
    for path in (TINY_GPT2 / "safetensors" / "model.safetensors", TINY_GPT2 / "pytorch" / "pytorch_model.bin"):
        with pytest.raises(DataError, match="give the folder"):
            convert(path, tmp_path / "tiny.bin")


@pytest.mark.parametrize("name", ["missing.bin", "missing.gguf", "./missing", "a/b/c", "no such name"])
def test_missing_source_is_rejected(tmp_path, name):
    with pytest.raises(DataError, match="no such file or folder"):
        convert(name, tmp_path / "tiny.bin")
