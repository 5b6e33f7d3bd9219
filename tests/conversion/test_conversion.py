"""Conversion between model files and Hugging Face folders."""

import json

import numpy as np
import pytest
from support.converting import BF16, MODEL, convert, load_tensors, transformers_model
from support.paths import TINY_GPT2

from llmc_cli.conversion import targets
from llmc_cli.formats.safetensors import SafetensorsFile, write_safetensors
from llmc_cli.formats.weights import NORMS_LAST, TENSORS, read_header


@pytest.mark.parametrize("form", ["safetensors", "pytorch"])
@pytest.mark.parametrize(("dtype", "expected"), [("fp32", MODEL), ("bf16", BF16)])
def test_folder_to_model_file_matches_golden_file(tmp_path, form, dtype, expected):
    written = convert(TINY_GPT2 / form, tmp_path / "tiny.bin", dtype=dtype)
    assert (tmp_path / "tiny.bin").read_bytes() == expected.read_bytes()
    assert [(file.path, file.bytes) for file in written] == [(tmp_path / "tiny.bin", expected.stat().st_size)]


@pytest.mark.parametrize(("dtype", "golden"), [("fp32", MODEL), ("bf16", BF16)])
def test_model_file_to_folder_and_back(tmp_path, dtype, golden):
    written = convert(golden, tmp_path / "folder", dtype=dtype)
    assert {file.path.name for file in written} == {"config.json", "model.safetensors"}
    tensors = SafetensorsFile(tmp_path / "folder" / "model.safetensors")
    assert {info.dtype for info in tensors.info.values()} == {targets.DTYPE_NAMES[dtype]}
    assert json.loads((tmp_path / "folder" / "config.json").read_bytes())["torch_dtype"] == targets.DTYPE_NAMES[dtype]
    convert(tmp_path / "folder", tmp_path / "back.bin", dtype=dtype)
    assert (tmp_path / "back.bin").read_bytes() == golden.read_bytes()


def test_written_folder_matches_transformers(tmp_path):
    convert(MODEL, tmp_path / "folder")
    converted = SafetensorsFile(tmp_path / "folder" / "model.safetensors")
    expected = SafetensorsFile(TINY_GPT2 / "safetensors" / "model.safetensors")
    assert set(converted) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(converted[name], expected[name])
    config = json.loads((TINY_GPT2 / "safetensors" / "config.json").read_bytes())
    for name, value in json.loads((tmp_path / "folder" / "config.json").read_bytes()).items():
        assert config.get(name, value) == value, name


@pytest.mark.parametrize(("golden", "version"), [(MODEL, 1), (MODEL, 3), (BF16, 5)])
def test_conversion_between_versions_is_lossless(tmp_path, golden, version):
    convert(golden, tmp_path / "there.bin", version=version)
    assert read_header(tmp_path / "there.bin").version == version
    convert(tmp_path / "there.bin", tmp_path / "again.bin", version=version)
    assert (tmp_path / "there.bin").read_bytes() == (tmp_path / "again.bin").read_bytes()
    convert(tmp_path / "again.bin", tmp_path / "back.bin", version=read_header(golden).version)
    assert (tmp_path / "back.bin").read_bytes() == golden.read_bytes()


@pytest.mark.parametrize(("version", "order"), [(4, TENSORS), (2, TENSORS), (2, NORMS_LAST)])
@pytest.mark.parametrize("forced", [False, True])
def test_read_versions_2_and_4(tmp_path, version, order, forced):
    """These versions have bfloat16 matrices and float32 layernorms."""
    header, tensors = read_header(BF16), load_tensors(BF16)
    tensors |= {name: values for name, values in load_tensors(MODEL).items() if name.startswith("ln")}
    with (tmp_path / "old.bin").open("wb") as file:
        file.write(np.array([20240326, version, *header[2:7], 128 if version == 4 else 0] + [0] * 248, "<i4"))
        for name in order:
            values = tensors[name][:97] if name == "wte" and version == 2 else tensors[name]
            if not name.startswith("ln"):
                values = values.copy().view("<u2")[..., 1::2].copy()
            file.write(values.tobytes())
    force = ("layers" if order is TENSORS else "norms last") if forced and version == 2 else None
    convert(tmp_path / "old.bin", tmp_path / "new.bin", order=force)
    for name, values in load_tensors(tmp_path / "new.bin").items():
        np.testing.assert_array_equal(values, tensors[name])


def test_tensor_names_of_older_checkpoints(tmp_path, rewrite_tensors):
    def rename(tensors):
        tensors = {name.removeprefix("transformer."): values for name, values in tensors.items()}
        masks = {
            f"h.{layer}.attn.{name}": np.ones((1, 1, 24, 24), np.float32) for layer in (0, 1) for name in ("bias",)
        }
        return {**tensors, **masks, "h.0.attn.masked_bias": np.float32([-1e4]), "lm_head.weight": tensors["wte.weight"]}

    convert(rewrite_tensors(rename), tmp_path / "tiny.bin")
    assert (tmp_path / "tiny.bin").read_bytes() == MODEL.read_bytes()


def test_sharded_checkpoint(tmp_path, tiny_folder):
    whole = SafetensorsFile(tiny_folder / "model.safetensors")
    names = list(whole)
    for number, half in enumerate((names[::2], names[1::2])):
        write_safetensors(tiny_folder / f"part-{number}.safetensors", {name: whole[name] for name in half})
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    (tiny_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tiny_folder / "model.safetensors").unlink()
    convert(tiny_folder, tmp_path / "tiny.bin")
    assert (tmp_path / "tiny.bin").read_bytes() == MODEL.read_bytes()


def test_read_bfloat16_and_float16_weights(tmp_path, rewrite_tensors):
    folder = rewrite_tensors(lambda tensors: None, "bfloat16")
    convert(folder, tmp_path / "tiny.bin", dtype="bf16")
    assert (tmp_path / "tiny.bin").read_bytes() == BF16.read_bytes()
    path = folder / "model.safetensors"
    half = {name: values.astype(np.float16) for name, values in SafetensorsFile(path).items()}
    write_float16(path, half)
    convert(folder, tmp_path / "half.bin")
    found = load_tensors(tmp_path / "half.bin")
    np.testing.assert_array_equal(found["wpe"], half["transformer.wpe.weight"].astype(np.float32))
    np.testing.assert_array_equal(found["fcw"][1], half["transformer.h.1.mlp.c_fc.weight"].T.astype(np.float32))


def write_float16(path, tensors):
    header, end = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F16", "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in tensors.values()))


@pytest.mark.witness
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_transformers_loads_converted_models(tmp_path, form):
    import torch
    from transformers import AutoModelForCausalLM

    model = transformers_model(seed=7).eval()
    model.save_pretrained(tmp_path / "saved")
    if form == "pickle":
        (tmp_path / "saved" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    convert(tmp_path / "saved", tmp_path / "model.bin")
    convert(tmp_path / "model.bin", tmp_path / "converted")
    convert(tmp_path / "model.bin", tmp_path / "converted_bf16", dtype="bf16")
    ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()(ids).logits
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "converted_bf16", dtype="auto").eval()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
