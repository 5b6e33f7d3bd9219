import hashlib
import json
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from llmc_cli import conversion, reference_batch
from llmc_cli.conversion import Request, plan
from llmc_cli.documents import shakespeare_text
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.debug_state import read_debug_state
from llmc_cli.formats.errors import FormatError, NonFiniteError, RangeError
from llmc_cli.formats.safetensors import SafetensorsFile, write_safetensors
from llmc_cli.formats.shard import write_shard
from llmc_cli.formats.vocabulary import read_vocabulary
from llmc_cli.formats.weights import NORMS_LAST, TENSORS, load_weights, read_header, tensor_shapes
from llmc_cli.models import huggingface, huggingface_weights
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.layout import parameter_shapes
from llmc_cli.tokenizer import GPT2_SHA256, load_tokenizer
from llmc_cli.tokenizer_files import merges, spell

TINY = Path(__file__).parent.parent / "fixtures" / "tiny_gpt2"
MODEL, BF16, STATE = (TINY / name for name in ("model.bin", "model_bf16.bin", "debug_state.bin"))


def convert(source, dest=None, **options):
    return list(plan(Request(str(source), dest, **options)).run(lambda what, done, total: None))


def tensors_of(path):
    """A model file's tensors by name."""
    header = read_header(path)
    shapes = tensor_shapes(header._replace(version=3))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    load_weights(path, tensors)
    return tensors


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny model's folder, to be changed."""
    shutil.copytree(TINY / "safetensors", tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def rewrite(folder):
    """Saves the folder's tensors anew after a change of the dict of them; returns the folder."""

    def run(change, dtype="float32"):
        path = folder / "model.safetensors"
        tensors = {name: np.array(values) for name, values in SafetensorsFile(path).items()}
        tensors = change(tensors) or tensors
        write_safetensors(path, tensors, dtype)
        return folder

    return run


@pytest.fixture
def shard(tmp_path):
    """The tokens of the tiny model's debug state."""
    state = read_debug_state(STATE)
    tokens = np.append(state.x.reshape(-1), state.y[-1, -1])
    write_shard(tmp_path / "shard.bin", tokens)
    return tmp_path / "shard.bin"


@pytest.mark.parametrize("form", ["safetensors", "pytorch"])
@pytest.mark.parametrize(("dtype", "expected"), [("fp32", MODEL), ("bf16", BF16)])
def test_a_folder_becomes_the_golden_file(tmp_path, form, dtype, expected):
    written = convert(TINY / form, tmp_path / "tiny.bin", dtype=dtype)
    assert (tmp_path / "tiny.bin").read_bytes() == expected.read_bytes()
    assert [(file.path, file.bytes) for file in written] == [(tmp_path / "tiny.bin", expected.stat().st_size)]


@pytest.mark.parametrize(("dtype", "golden"), [("fp32", MODEL), ("bf16", BF16)])
def test_a_file_comes_back_from_a_folder(tmp_path, dtype, golden):
    written = convert(golden, tmp_path / "folder", dtype=dtype)
    assert {file.path.name for file in written} == {"config.json", "model.safetensors"}
    tensors = SafetensorsFile(tmp_path / "folder" / "model.safetensors")
    assert {info.dtype for info in tensors.info.values()} == {conversion.STORED[dtype]}
    assert json.loads((tmp_path / "folder" / "config.json").read_bytes())["torch_dtype"] == conversion.STORED[dtype]
    convert(tmp_path / "folder", tmp_path / "back.bin", dtype=dtype)
    assert (tmp_path / "back.bin").read_bytes() == golden.read_bytes()


def test_a_folder_holds_what_transformers_saves(tmp_path):
    convert(MODEL, tmp_path / "folder")
    ours = SafetensorsFile(tmp_path / "folder" / "model.safetensors")
    theirs = SafetensorsFile(TINY / "safetensors" / "model.safetensors")
    assert set(ours) == set(theirs)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    config = json.loads((TINY / "safetensors" / "config.json").read_bytes())
    for name, value in json.loads((tmp_path / "folder" / "config.json").read_bytes()).items():
        assert config.get(name, value) == value, name


@pytest.mark.parametrize(("golden", "version"), [(MODEL, 1), (MODEL, 3), (BF16, 5)])
def test_versions_come_back(tmp_path, golden, version):
    convert(golden, tmp_path / "there.bin", version=version)
    assert read_header(tmp_path / "there.bin").version == version
    convert(tmp_path / "there.bin", tmp_path / "again.bin", version=version)
    assert (tmp_path / "there.bin").read_bytes() == (tmp_path / "again.bin").read_bytes()
    convert(tmp_path / "again.bin", tmp_path / "back.bin", version=read_header(golden).version)
    assert (tmp_path / "back.bin").read_bytes() == golden.read_bytes()


@pytest.mark.parametrize(("version", "order"), [(4, TENSORS), (2, TENSORS), (2, NORMS_LAST)])
@pytest.mark.parametrize("forced", [False, True])
def test_older_versions_are_read(tmp_path, version, order, forced):
    """Matrices in bfloat16, layernorms in float32."""
    header, tensors = read_header(BF16), tensors_of(BF16)
    tensors |= {name: values for name, values in tensors_of(MODEL).items() if name.startswith("ln")}
    with (tmp_path / "old.bin").open("wb") as file:
        file.write(np.array([20240326, version, *header[2:7], 128 if version == 4 else 0] + [0] * 248, "<i4"))
        for name in order:
            values = tensors[name][:97] if name == "wte" and version == 2 else tensors[name]
            if not name.startswith("ln"):
                values = values.copy().view("<u2")[..., 1::2].copy()
            file.write(values.tobytes())
    force = ("layers" if order is TENSORS else "norms last") if forced and version == 2 else None
    convert(tmp_path / "old.bin", tmp_path / "new.bin", order=force)
    for name, values in tensors_of(tmp_path / "new.bin").items():
        np.testing.assert_array_equal(values, tensors[name])


def test_a_wrong_order_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="version 3"):
        convert(MODEL, tmp_path / "new.bin", order="layers")
    with pytest.raises(UsageError, match="--order"):
        convert(TINY / "safetensors", tmp_path / "new.bin", order="layers")


def test_names_without_prefix_masks_and_a_tied_head(tmp_path, rewrite):
    def older(tensors):
        tensors = {name.removeprefix("transformer."): values for name, values in tensors.items()}
        masks = {
            f"h.{layer}.attn.{name}": np.ones((1, 1, 24, 24), np.float32) for layer in (0, 1) for name in ("bias",)
        }
        return {**tensors, **masks, "h.0.attn.masked_bias": np.float32([-1e4]), "lm_head.weight": tensors["wte.weight"]}

    convert(rewrite(older), tmp_path / "tiny.bin")
    assert (tmp_path / "tiny.bin").read_bytes() == MODEL.read_bytes()


def test_parts_with_an_index(tmp_path, folder):
    whole = SafetensorsFile(folder / "model.safetensors")
    names = list(whole)
    for number, half in enumerate((names[::2], names[1::2])):
        write_safetensors(folder / f"part-{number}.safetensors", {name: whole[name] for name in half})
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    convert(folder, tmp_path / "tiny.bin")
    assert (tmp_path / "tiny.bin").read_bytes() == MODEL.read_bytes()


def test_bfloat16_and_float16_weights(tmp_path, rewrite):
    folder = rewrite(lambda tensors: None, "bfloat16")
    convert(folder, tmp_path / "tiny.bin", dtype="bf16")
    assert (tmp_path / "tiny.bin").read_bytes() == BF16.read_bytes()
    path = folder / "model.safetensors"
    half = {name: values.astype(np.float16) for name, values in SafetensorsFile(path).items()}
    write_float16(path, half)
    convert(folder, tmp_path / "half.bin")
    found = tensors_of(tmp_path / "half.bin")
    np.testing.assert_array_equal(found["wpe"], half["transformer.wpe.weight"].astype(np.float32))
    np.testing.assert_array_equal(found["fcw"][1], half["transformer.h.1.mlp.c_fc.weight"].T.astype(np.float32))


def write_float16(path, tensors):
    header, end = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F16", "shape": values.shape, "data_offsets": [end, end + values.nbytes]}
        end += values.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for values in tensors.values()))


def with_(**changed):
    return lambda tensors: tensors | {f"transformer.{name.replace('__', '.')}": v for name, v in changed.items()}


BAD_FOLDERS = {
    "another head": (lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1}, "only a tied head"),
    "unknown": (with_(h__0__attn__extra=np.zeros(3, np.float32)), r"transformer\.h\.0\.attn\.extra, which a GPT-2"),
    "one layer too many": (with_(h__2__ln_1__bias=np.zeros(16, np.float32)), r"found transformer\.h\.2\.ln_1\.bias"),
    "missing": (lambda t: {name: v for name, v in t.items() if ".h.1." not in name}, "lack h.1.*and 9 more"),
    "both names": (lambda t: {**t, "wpe.weight": t["transformer.wpe.weight"]}, "found both wpe.weight"),
    "shape": (with_(wpe__weight=np.zeros((23, 16), np.float32)), r"wpe.weight is \(23, 16\).*\(24, 16\)"),
    "not transposed": (
        lambda t: {name: v.T if "c_fc.weight" in name else v for name, v in t.items()},
        r"c_fc.weight is \(64, 16\).*\(16, 64\)",
    ),
    "head's shape": (lambda t: {**t, "lm_head.weight": np.zeros((96, 16), np.float32)}, "lm_head.weight is"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_tensors_that_do_not_fit(tmp_path, rewrite, case):
    change, message = BAD_FOLDERS[case]
    with pytest.raises(DataError, match=message):
        convert(rewrite(change), tmp_path / "tiny.bin")
    assert not (tmp_path / "tiny.bin").exists()


def test_an_absurd_config_costs_nothing(tmp_path, folder):
    config = json.loads((folder / "config.json").read_bytes())
    for change, message in (({"n_layer": 10**9}, "cannot be 1,000,000,000 layers"), ({"n_positions": 10**12}, "wpe")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=message):
            convert(folder, tmp_path / "tiny.bin")


def test_integers_are_no_weights(tmp_path, folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    at = content.index(b'"F32"', content.index(b"transformer.wpe.weight"))
    path.write_bytes(content[:at] + b'"I32"' + content[at + 5 :])
    with pytest.raises(DataError, match=r"wpe.weight is int32"):
        convert(folder, tmp_path / "tiny.bin")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, rewrite, value):
    def change(tensors):
        tensors["transformer.h.1.mlp.c_proj.weight"][5, 3] = value

    with pytest.raises(NonFiniteError, match=r"h\.1\.mlp\.c_proj\.weight\[5, 3\]"):
        convert(rewrite(change), tmp_path / "tiny.bin")


def test_folders_that_are_no_model(tmp_path, folder):
    with pytest.raises(DataError, match=r"config\.json"):
        convert(tmp_path, tmp_path / "tiny.bin")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(MissingError, match="llama: not yet"):
        convert(folder, tmp_path / "tiny.bin")
    (folder / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(DataError, match="relu"):
        convert(folder, tmp_path / "tiny.bin")
    (folder / "config.json").write_text("[]")
    with pytest.raises(DataError):
        convert(folder, tmp_path / "tiny.bin")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        convert(folder, tmp_path / "tiny.bin")


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        (b"GGUF\3\0\0\0", MissingError, "GGUF file: not yet"),
        (np.array([20240803, 3], "<i4").tobytes(), MissingError, "Llama 3 model: not yet"),
        (np.array([0x616B3432, 1], "<i4").tobytes(), MissingError, "llama2.c model: not yet"),
        (np.array([20240520, 1], "<i4").tobytes(), DataError, "GPT-2 token shard, expected a GPT-2 model"),
        (b"hello, world", FormatError, "a file of a known kind"),
    ],
)
def test_files_that_are_no_gpt2(tmp_path, start, error, message):
    path = tmp_path / "other.bin"
    path.write_bytes(start + bytes(2048))
    with pytest.raises(error, match=message):
        convert(path, tmp_path / "tiny.bin")


def test_weights_alone_are_no_model(tmp_path):
    for path in (TINY / "safetensors" / "model.safetensors", TINY / "pytorch" / "pytorch_model.bin"):
        with pytest.raises(DataError, match="give the folder"):
            convert(path, tmp_path / "tiny.bin")


@pytest.mark.parametrize("name", ["missing.bin", "missing.gguf", "./missing", "a/b/c", "no such name"])
def test_a_name_of_nothing(tmp_path, name):
    with pytest.raises(DataError, match="no such file or folder"):
        convert(name, tmp_path / "tiny.bin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 5, "dtype": "fp32"}, "holds bf16"),
        ({"version": 3, "dtype": "bf16"}, "holds fp32"),
        ({"version": 2}, "not written"),
        ({"version": 4, "dtype": "bf16"}, "not written"),
        ({"batch": 4}, "--batch"),
        ({"seq_len": 8}, "--seq-len"),
        ({"data": Path("x.bin")}, "--data"),
        ({"reference": "numpy"}, "--reference"),
    ],
)
def test_options_that_contradict(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        convert(MODEL, tmp_path / "tiny.bin", **options)


def test_destinations_that_cannot_be(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy.bin"
    shutil.copy(MODEL, copy)
    (tmp_path / "plain").write_text("x")
    (tmp_path / "taken.bin").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    cases = [
        (copy, None, {}, "give a DEST"),
        (copy, None, {"dtype": "bf16"}, "give a DEST"),
        (copy, copy, {}, "what is read"),
        (copy, Path("copy.bin"), {}, "what is read"),
        (folder, folder, {}, "what is read"),
        (TINY / "pytorch", TINY / "pytorch" / "pytorch_model.bin", {}, "what is read"),
        (copy, Path("new.bin"), {"tokenizer": tmp_path / "new.bin"}, "twice"),
        (copy, Path("new.gguf"), {}, r"\.bin"),
        (copy, Path("plain"), {}, r"\.bin"),
        (copy, Path(), {}, "name of a folder"),
        (copy, Path(".."), {}, "name of a folder"),
        (copy, Path("taken.bin"), {}, "folder"),
        (copy, Path("full"), {}, r"thesis\.tex"),
        (copy, Path("new"), {"version": 3}, "--version"),
        (copy, Path("-"), {}, "files only"),
        ("-", Path("new.bin"), {}, "files only"),
    ]
    for source, dest, options, message in cases:
        with pytest.raises(UsageError, match=message):
            convert(source, dest, **options)
    assert copy.read_bytes() == MODEL.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.bin", "full", "plain", "source", "taken.bin"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_a_pipe_or_device_is_no_destination(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"\.bin"):
        convert(MODEL, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_folder_is_replaced_as_a_whole(tmp_path, monkeypatch):
    dest = tmp_path / "folder"
    convert(MODEL, dest)
    (dest / "vocab.json").write_text("{}")
    before = (dest / "model.safetensors").read_bytes()

    def fail(path, tensors, dtype):
        path.parent.mkdir()
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(conversion, "write_safetensors", fail)
        convert(BF16, dest)
    assert (dest / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    convert(BF16, dest)
    assert (dest / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in dest.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_interrupt_while_a_folder_is_replaced(tmp_path, monkeypatch):
    dest = tmp_path / "folder"
    convert(MODEL, dest)
    before = (dest / "model.safetensors").read_bytes()
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        convert(BF16, dest)
    assert (dest / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_debug_state_is_the_golden_one(tmp_path, shard):
    convert(MODEL, debug_state=tmp_path / "state.bin", batch=2, seq_len=16, data=shard, reference="numpy")
    found, golden = (read_debug_state(path, read_header(MODEL)) for path in (tmp_path / "state.bin", STATE))
    np.testing.assert_array_equal(found.x, golden.x)
    np.testing.assert_array_equal(found.y, golden.y)
    np.testing.assert_allclose(found.logits, golden.logits, rtol=0, atol=1e-6)
    assert found.loss == pytest.approx(golden.loss, rel=1e-6)
    for name, values in golden.grads.items():
        np.testing.assert_allclose(found.grads[name], values, rtol=0, atol=1e-7)


def test_batches_that_cannot_be(tmp_path, shard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tmp_path / "state.bin"
    with pytest.raises(UsageError, match="24 positions"):
        convert(MODEL, debug_state=state, seq_len=25, data=shard)
    with pytest.raises(DataError, match="33 tokens, expected 97"):
        convert(MODEL, debug_state=state, data=shard)
    with pytest.raises(UsageError, match="--data"):
        convert(MODEL, debug_state=state)
    write_shard(tmp_path / "large.bin", np.full(100, 97))
    with pytest.raises(RangeError, match="97"):
        convert(MODEL, debug_state=state, data=tmp_path / "large.bin")
    assert not state.exists()


def test_torch_where_it_is_not(tmp_path, shard, monkeypatch):
    monkeypatch.setattr(reference_batch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install torch"):
        convert(MODEL, debug_state=tmp_path / "state.bin", data=shard, reference="torch")
    assert reference_batch.choose_reference(None) == "numpy"


@pytest.fixture
def wide(tmp_path):
    """A folder with a model that has GPT-2's vocabulary, and little else."""
    config = ModelConfig(64, 50257, 1, 1, 2)
    generator = np.random.default_rng(5)
    params = {name: generator.standard_normal(shape, np.float32) for name, shape in parameter_shapes(config).items()}
    write_safetensors(tmp_path / "wide" / "model.safetensors", huggingface_weights.export(config, params))
    (tmp_path / "wide" / "config.json").write_text(json.dumps(huggingface.config_values(config)))
    return tmp_path / "wide"


def test_gpt2_gives_four_files(tmp_path, wide, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmc_cli.hub.fetch_model", lambda repository, tokenizer, on_bytes: wide)
    shortfalls = []
    conversion = plan(Request("gpt2", reference="numpy"), on_shortfall=shortfalls.append)
    files = list(conversion.run(lambda what, done, total: None))
    assert [str(file.path) for file in files] == [
        "gpt2_124M.bin",
        "gpt2_124M_bf16.bin",
        "gpt2_124M_debug_state.bin",
        "gpt2_tokenizer.bin",
    ]
    assert [read_header(file.path).version for file in files[:2]] == [3, 5]
    state = read_debug_state(files[2].path, read_header(files[0].path))
    assert state.x.shape == (4, 64)
    assert state.x[0, 0] == 50256  # a document begins
    assert "bundled text" in shortfalls[0]
    assert files[3].bytes == 372_108


def test_the_tokenizer_table_is_exact(tmp_path, wide):
    convert(wide, tokenizer=tmp_path / "table.bin")
    assert hashlib.sha256((tmp_path / "table.bin").read_bytes()).hexdigest() == GPT2_SHA256


def test_a_folder_with_gpt2s_vocabulary_gets_its_tokenizer(tmp_path, wide):
    convert(wide, tmp_path / "model.bin")
    convert(tmp_path / "model.bin", tmp_path / "folder")
    ours, theirs = load_tokenizer("gpt2"), load_tokenizer(str(tmp_path / "folder"))
    assert theirs.tokens == ours.tokens
    assert theirs.end_of_text == ours.end_of_text == 50256
    text = shakespeare_text("bundled").text[:20_000] + " \n\n\t 'twas naïve, 日本語 🙂 x1234y <|endoftext|> "
    np.testing.assert_array_equal(theirs.encode(text), ours.encode(text))
    convert(tmp_path / "folder", tokenizer=tmp_path / "table.bin")
    assert hashlib.sha256((tmp_path / "table.bin").read_bytes()).hexdigest() == GPT2_SHA256


def test_merges_are_those_of_openai():
    """The file that OpenAI published lists them, a line each."""
    lines = [f"{spell(left)} {spell(right)}\n" for left, right in merges(load_tokenizer("gpt2"))]
    text = "".join(["#version: 0.2\n", *lines])
    found = hashlib.sha256(text.encode()).hexdigest()
    assert found == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


@pytest.fixture
def letters(folder):
    """The tiny model's folder with a tokenizer of its own, of single bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:90]
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.add_special_tokens(["<|endoftext|>"])
    rust.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_of_its_own_comes_along(tmp_path, letters):
    convert(letters, tmp_path / "folder", tokenizer=tmp_path / "table.bin")
    assert (tmp_path / "folder" / "tokenizer.json").read_bytes() == (letters / "tokenizer.json").read_bytes()
    table = read_vocabulary(tmp_path / "table.bin")
    assert (len(table.tokens), table.end_of_text) == (91, 90)


def test_tokenizers_that_cannot_be(tmp_path, letters):
    with pytest.raises(DataError, match="no tokenizer is known for a vocabulary of 97"):
        convert(MODEL, tokenizer=tmp_path / "table.bin")
    config = json.loads((letters / "config.json").read_bytes())
    (letters / "config.json").write_text(json.dumps(config | {"vocab_size": 90}))
    with pytest.raises(DataError, match="91 tokens, expected at most the 90"):
        convert(letters, tokenizer=tmp_path / "table.bin")
    (letters / "tokenizer.json").rename(letters / "vocab.json")
    with pytest.raises(DataError, match=r"vocab\.json only"):
        convert(letters, tokenizer=tmp_path / "table.bin")
    assert not (tmp_path / "table.bin").exists()


@pytest.fixture(scope="module")
def witness():
    """The program that made the goldens, with PyTorch and transformers."""
    return runpy.run_path(str(TINY.parent / "make_gpt2_goldens.py"))


@pytest.mark.witness
@pytest.mark.parametrize("form", ["safetensors", "pickle"])
def test_transformers_loads_what_it_saved(tmp_path, witness, form):
    import torch
    from transformers import AutoModelForCausalLM

    model = witness["make_model"](seed=7).eval()
    model.save_pretrained(tmp_path / "theirs")
    if form == "pickle":
        (tmp_path / "theirs" / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    convert(tmp_path / "theirs", tmp_path / "model.bin")
    convert(tmp_path / "model.bin", tmp_path / "ours")
    convert(tmp_path / "model.bin", tmp_path / "ours16", dtype="bf16")
    ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        expected = model(ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()(ids).logits
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "ours16", dtype="auto").eval()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


@pytest.mark.witness
def test_both_references_agree(tmp_path, witness, shard):
    witness["make_model"](seed=9).save_pretrained(tmp_path / "theirs")
    states = []
    for reference in ("torch", "numpy"):
        path = tmp_path / f"{reference}.bin"
        options = {"batch": 2, "seq_len": 16, "data": shard, "reference": reference}
        convert(tmp_path / "theirs", tmp_path / "model.bin", debug_state=path, **options)
        states.append(read_debug_state(path, read_header(tmp_path / "model.bin")))
    by_torch, by_numpy = states
    np.testing.assert_allclose(by_torch.logits, by_numpy.logits, rtol=0, atol=1e-6)
    assert by_torch.loss == pytest.approx(by_numpy.loss, rel=1e-6)
    for name, values in by_numpy.grads.items():
        np.testing.assert_allclose(by_torch.grads[name], values, rtol=0, atol=1e-7)


@pytest.mark.witness
def test_transformers_takes_the_tokenizer(tmp_path, wide):
    from transformers import AutoTokenizer

    convert(wide, tmp_path / "model.bin")
    convert(tmp_path / "model.bin", tmp_path / "folder")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "folder"), load_tokenizer("gpt2")
    text = shakespeare_text("bundled").text[:200] + " \n\n\t 'twas naïve, 日本語 🙂 x1234y"
    assert theirs.encode(text) == ours.encode(text).tolist()
    assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == text
    assert theirs.eos_token_id == 50256
