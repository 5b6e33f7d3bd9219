"""Identification of files, and the header checks shared by all formats."""

import struct
import zipfile

import numpy as np
import pytest

from llmc_cli.formats import header, registry
from llmc_cli.formats.errors import MagicError, RangeError, RefusedError, SizeError, VersionError
from llmc_cli.formats.registry import FORMATS, Kind, identify


def slots_file(path, *slots):
    path.write_bytes(struct.pack("<256i", *slots, *[0] * (256 - len(slots))))
    return path


@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (20240326, Kind.GPT2_MODEL),
        (20240327, Kind.GPT2_DEBUG_STATE),
        (20240328, Kind.VOCABULARY),
        (20240520, Kind.SHARD_GPT2),
        (20240522, Kind.EVALSET),
        (20240527, Kind.TRAIN_STATE),
        (20240801, Kind.SHARD_LLAMA3),
        (20240803, Kind.LLAMA3_MODEL),
        (0x616B3432, Kind.LLAMA2C_MODEL),
    ],
)
def test_identify_by_magic_number(tmp_path, magic, kind):
    assert identify(slots_file(tmp_path / "f", magic)) is kind


def test_identify_files_of_other_projects(tmp_path):
    (tmp_path / "g").write_bytes(b"GGUF\x03\0\0\0")
    assert identify(tmp_path / "g") is Kind.GGUF
    (tmp_path / "s").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert identify(tmp_path / "s") is Kind.SAFETENSORS
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("model/data.pkl", b"")
    assert identify(tmp_path / "z") is Kind.TORCH_ZIP


@pytest.mark.parametrize("name", ["f.bin", "f.txt"])
@pytest.mark.parametrize("content", [b"", b"abc", b"hello, world", struct.pack("<8i", *range(8)), b"PK\x03\x04 no zip"])
def test_unknown_files_are_rejected(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MagicError) as caught:
        identify(tmp_path / name)
    assert ("empty or truncated" in str(caught.value)) == (len(content) < 4)
    may_be_headerless = name == "f.bin" and len(content) >= 4 and len(content) % 4 == 0
    assert ("headerless token file cannot be identified" in str(caught.value)) == may_be_headerless


def test_other_zip_file_is_rejected(tmp_path):
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("readme.txt", b"")
    with pytest.raises(MagicError):
        identify(tmp_path / "z")


def test_remedies_for_big_endian_files_and_lfs_pointers(tmp_path):
    (tmp_path / "b").write_bytes(struct.pack(">256i", 20240326, 3, *[0] * 254))
    with pytest.raises(MagicError, match="reverse order"):
        identify(tmp_path / "b")
    with pytest.raises(MagicError, match="reverse order"):
        header.read_slots(tmp_path / "b", Kind.GPT2_MODEL)
    (tmp_path / "p").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(MagicError, match="git lfs pull"):
        identify(tmp_path / "p")


def test_pickle_of_old_pytorch_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(bytes.fromhex("80028a0a6cfc9c46f9206aa85019") + b".")
    with pytest.raises(RefusedError, match=r"PyTorch before version 1\.6"):
        identify(tmp_path / "f")


def test_kinds_without_a_reader_are_refused(tmp_path):
    with pytest.raises(RefusedError, match=r"found a Llama 3 model.*not supported yet"):
        registry.check_readable(tmp_path / "f", Kind.LLAMA3_MODEL)
    registry.check_readable(tmp_path / "f", Kind.GPT2_MODEL)
    registry.check_readable(tmp_path / "f", Kind.SAFETENSORS)


def test_magic_numbers_are_unique():
    assert len({entry.magic for entry in FORMATS.values()}) == len(FORMATS)


@pytest.mark.parametrize("size", [0, 3, 4, 1023])
def test_truncated_header_is_a_size_error(tmp_path, size):
    path = slots_file(tmp_path / "f", 20240520, 1, 0)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SizeError, match=f"{size} bytes"):
        header.read_slots(path, Kind.SHARD_GPT2)


def test_wrong_magic_number_is_reported(tmp_path):
    path = slots_file(tmp_path / "f", 20240522, 1)
    with pytest.raises(
        MagicError, match=r"found an evaluation set \(magic number 20240522\), expected a GPT-2 .*20240520"
    ):
        header.read_slots(path, Kind.SHARD_GPT2)


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        (Kind.SHARD_GPT2, 7),
        (Kind.SHARD_LLAMA3, 1),
        (Kind.EVALSET, 2),
        (Kind.VOCABULARY, 3),
        (Kind.GPT2_MODEL, 6),
        (Kind.GPT2_MODEL, 0),
        (Kind.GPT2_DEBUG_STATE, 3),
        (Kind.TRAIN_STATE, -1),
    ],
)
def test_unknown_versions_are_rejected(tmp_path, kind, version):
    path = slots_file(tmp_path / "f", FORMATS[kind].magic, version)
    with pytest.raises(VersionError, match=f"version {version} of the {kind.value} format"):
        header.read_slots(path, kind)


def test_uint64_slots_are_little_endian():
    slots = header.new_slots(Kind.TRAIN_STATE, 1)
    header.set_uint64(slots, 20, 2**64 - 2)
    assert slots.tobytes()[80:88] == b"\xfe" + b"\xff" * 7
    assert header.get_uint64(slots, 20) == 2**64 - 2
    assert not slots[22:].any()


def test_check_size_and_check_range(tmp_path):
    (tmp_path / "f").write_bytes(bytes(10))
    header.check_size(tmp_path / "f", 10, "ten")
    for expected, remedy in ((11, "truncated"), (9, "extra bytes")):
        with pytest.raises(SizeError, match=f"found a file size of 10 bytes, expected {expected}.*{remedy}"):
            header.check_size(tmp_path / "f", expected, "a test")
    header.check_range(tmp_path, "n", 3, 3, 3)
    for value in (2, 5):
        with pytest.raises(RangeError, match=f"n = {value}, expected 3 to 4"):
            header.check_range(tmp_path, "n", value, 3, 4)


def test_slots_are_little_endian():
    assert header.new_slots(Kind.GPT2_MODEL, 3).dtype == np.dtype("<i4")
    assert header.new_slots(Kind.GPT2_MODEL, 3).tobytes()[:8] == struct.pack("<2i", 20240326, 3)
