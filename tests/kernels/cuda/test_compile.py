"""Every CUDA program compiles for every architecture without warnings, into kernels that can be launched."""

import runpy

import pytest
from support.cuda_compiler import PROGRAMS, Variant, compile_all, library
from support.cuda_emulator.architectures import ARCHITECTURES, blocks_at_once
from support.cuda_launches import launches
from support.paths import ROOT

from llmc_cli.kernels.cuda.device import TENSOR_CORES

pytestmark = pytest.mark.nvrtc

VERSIONS = (12, 13)
DEVICES = [
    (capability, bf16)
    for capability in ARCHITECTURES
    for bf16 in (False, True)
    if not bf16 or capability >= TENSOR_CORES
]
"""(capability, bf16) of what ``Device`` accepts."""


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda version: f"cuda{version}")
def version(request):
    assert library(request.param), "install nvidia-cuda-nvrtc and nvidia-cuda-nvrtc-cu12"
    return request.param


@pytest.fixture(scope="module")
def compiled(version):
    return compile_all(version)


@pytest.mark.parametrize("program", PROGRAMS)
def test_compiles_without_warnings(compiled, program):
    complaints = {variant: each.complaints for variant, each in compiled.items() if variant.program == program}
    assert {variant: said for variant, said in complaints.items() if said} == {}
    assert all(compiled[variant].kernels for variant in complaints)


def test_no_register_spills(compiled):
    spilled = {
        (variant, name): kernel
        for variant, each in compiled.items()
        for name, kernel in each.kernels.items()
        if kernel.spilled or kernel.stack
    }
    assert spilled == {}


@pytest.mark.parametrize("capability, bf16", DEVICES)
def test_every_launch_fits_on_a_multiprocessor(compiled, capability, bf16):
    """At least one block fits on a multiprocessor, by registers, threads and shared memory."""
    refused = {}
    for (program, name), launch in launches(bf16, capability).items():
        kernel = compiled[Variant(program, bf16, capability)].kernels[name]
        if not blocks_at_once(capability, kernel.registers, launch.threads, kernel.shared + launch.shared):
            refused[program, name] = (kernel, launch)
    assert refused == {}


def test_every_kernel_is_launched(compiled):
    """A kernel that no device launches is dead code, and its launches are not checked."""
    launched = set().union(*(launches(bf16, capability) for capability, bf16 in DEVICES))
    there = {(variant.program, name) for variant, each in compiled.items() for name in each.kernels}
    assert launched == there


def test_table_is_up_to_date(compiled, version):
    if version != max(VERSIONS):
        return  # the table is made with the newest
    script = runpy.run_path(str(ROOT / "fixtures" / "make_cuda_table.py"))
    page = ROOT / "docs" / "cuda.md"
    stale = script["page"](page.read_text(encoding="utf-8"), compiled) != page.read_text(encoding="utf-8")
    assert not stale, "out of date; run: python fixtures/make_cuda_table.py"
