"""Asynchronous uploads, on the fake CuPy."""

import ctypes

import numpy as np
import pytest
from support.fake_cupy import cupy

from llmc_cli.kernels.cuda.device import Device

VALUES = [np.arange(k, k + 50, dtype=np.int32) for k in range(1, 7)]


@pytest.fixture(params=[None, 1, 2], ids=["late", "random-1", "random-2"])
def opened(request, monkeypatch, fake_cupy):
    """A device whose streams defer work as long as permitted, or randomly."""
    if request.param is not None:
        monkeypatch.setenv("LLMC_EMULATOR_SEED", str(request.param))
    return Device(0, False)


def seen(opened):
    """Return the array after each asynchronous upload from ``VALUES``; the host buffer is reused immediately."""
    array = opened.alloc((50,), np.int32)
    found, memory = [], np.empty(50, np.int32)
    for values in VALUES:
        memory[:] = values
        opened.upload_async(array, memory)
        memory[:] = -1
        found.append(opened.alloc((50,), np.int32))
        opened.copy(found[-1], array)
    return [opened.download(each).tolist() for each in found]


def test_uploads_arrive_in_order(opened):
    assert seen(opened) == [values.tolist() for values in VALUES]


def test_mixed_with_synchronous_uploads(opened):
    array = opened.alloc((50,), np.int32)
    for turn, values in enumerate(VALUES):
        (opened.upload if turn % 2 else opened.upload_async)(array, values)
        if turn % 3:
            assert opened.download(array).tolist() == values.tolist()
    assert opened.download(array).tolist() == VALUES[-1].tolist()


@pytest.mark.parametrize("opened", [None], indirect=True, ids=["late"])
@pytest.mark.parametrize("left_out", ["the device's", "the upload's"])
def test_missing_wait_is_detected(opened, monkeypatch, left_out):
    """Both streams must wait for each other."""
    ahead, wait = opened._prefetch_stream, cupy.cuda.Stream.wait_event

    def sometimes(stream, event):
        if (stream is ahead) != (left_out == "the upload's"):
            wait(stream, event)

    monkeypatch.setattr(cupy.cuda.Stream, "wait_event", sometimes)
    assert seen(opened) != [values.tolist() for values in VALUES]


@pytest.mark.parametrize("sizes", [(50, 20), (20, 50)])
def test_reused_address_of_a_deleted_array(opened, sizes):
    """Staging buffers of the deleted array are not used for the new one."""
    first, second = (np.arange(size, dtype=np.int32) for size in sizes)
    array = opened.alloc((50,), np.int32)
    there = array[: sizes[0]], array[: sizes[1]]
    opened.upload(array, np.full(50, 7))
    opened.upload_async(there[0], first)
    opened.upload(array, np.full(50, 7))
    opened.upload_async(there[1], second)
    expected = [*second, *[7] * (50 - sizes[1])]
    assert opened.download(array).tolist() == expected


def test_transfer_starts_immediately(opened):
    array = opened.alloc((50,), np.int32)
    opened.upload(array, VALUES[0])
    opened.upload_async(array, VALUES[1])
    opened._prefetch_stream.synchronize()
    near = opened._staging[array.data.ptr].prefetched
    there = (ctypes.c_int32 * 50).from_address(near.data.ptr)
    assert list(there) == VALUES[1].tolist()
