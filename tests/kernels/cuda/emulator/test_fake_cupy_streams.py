"""Copies, streams, events and captures of the fake CuPy, which defers all work as long as permitted."""

import gc

import numpy as np
import pytest
from support.fake_cupy import cupy, pinned, raw, runtime

pytestmark = pytest.mark.usefixtures("clear_streams")


def test_copy_from_pinned_memory_is_deferred():
    host, device = pinned(4), cupy.empty(4, np.float32)
    host[:] = 1
    device.set(host)
    host[:] = 2  # before the copy has run
    assert (device.get() == 2).all()


def test_copy_from_pageable_memory_reads_immediately():
    host, device = np.ones(4, np.float32), cupy.empty(4, np.float32)
    device.set(host)
    host[:] = 2
    assert (device.get() == 1).all()


def test_copy_to_pinned_memory_is_deferred():
    host, device = pinned(4), cupy.zeros(4, np.float32)
    stream = cupy.cuda.Stream()
    runtime.memcpyAsync(host.ctypes.data, device.data.ptr, 16, runtime.memcpyDeviceToHost, stream.ptr)
    assert np.isnan(host).all()
    stream.synchronize()
    assert (host == 0).all()


def test_streams_wait_only_for_events(double):
    first, second = cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream(non_blocking=True)
    x, y = cupy.empty(4, np.float32), cupy.empty(4, np.float32)
    copy = (y.data.ptr, x.data.ptr, 16, runtime.memcpyDeviceToDevice, second.ptr)
    x.set(np.ones(4, np.float32), first)
    double(x, stream=first)
    runtime.memcpyAsync(*copy)
    assert np.isnan(y.get(second)).all()
    x.set(np.ones(4, np.float32), first)
    double(x, stream=first)
    second.wait_event(first.record())
    runtime.memcpyAsync(*copy)
    assert (y.get(second) == 2).all()


def test_null_stream_synchronizes_with_blocking_streams(double):
    for non_blocking in (False, True):
        stream = cupy.cuda.Stream(non_blocking=non_blocking)
        x = cupy.zeros(4, np.float32)  # on the null stream
        with stream:
            double(x)
            assert np.isnan(x.get()).all() == non_blocking


def test_used_stream_is_current(double):
    stream = cupy.cuda.Stream(non_blocking=True).use()
    x = cupy.zeros(4, np.float32)
    assert (x.get(stream) == 0).all()
    cupy.cuda.Stream.null.use()


def test_seed_randomizes_deferral(monkeypatch, double):
    """With a seed, some copies from pinned memory run immediately and some are deferred."""
    monkeypatch.setenv("LLMC_EMULATOR_SEED", "1")
    monkeypatch.setattr(raw.emulator, "schedule", lambda seed: None)
    host, seen = pinned(1), set()
    for _ in range(40):
        device = cupy.empty(1, np.float32)
        host[:] = 1
        device.set(host)
        host[:] = 2
        seen.add(float(device.get()[0]))
    assert seen == {1.0, 2.0}


def test_events():
    stream = cupy.cuda.Stream(non_blocking=True)
    first, second, untimed = cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.Event(disable_timing=True)
    first.record(stream)
    stream.record(second)
    untimed.record(stream)
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorNotReady"):
        cupy.cuda.get_elapsed_time(first, second)
    assert not second.done
    second.synchronize()
    assert second.done
    assert not untimed.done
    assert cupy.cuda.get_elapsed_time(first, second) >= 0
    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorInvalidResourceHandle"):
        cupy.cuda.get_elapsed_time(first, untimed)


def test_graph_replays(double):
    stream = cupy.cuda.Stream(non_blocking=True)
    x = cupy.empty(4, np.float32)
    host = pinned(4)
    with stream:
        stream.begin_capture()
        x.set(host)
        double(x)
        double(x)
        graph = stream.end_capture()
        assert np.isnan(x.get()).all()
        for value in (1, 2):
            host[:] = value
            graph.launch(stream)
            assert (x.get() == 4 * value).all()
        del x
        gc.collect()
        with pytest.raises(runtime.CUDARuntimeError, match="freed"):
            graph.launch()


def test_operations_rejected_during_capture():
    """Operations that cannot be captured raise an error and invalidate the capture."""
    stream = cupy.cuda.Stream()
    x, host = cupy.zeros(4, np.float32), np.zeros(4, np.float32)
    rejected = {
        "cudaErrorStreamCaptureUnsupported": (
            *(stream.synchronize, cupy.cuda.Device().synchronize, x.get, lambda: x.set(host)),
            *(lambda: cupy.empty(1, np.float32), lambda: pinned(1), lambda: cupy.RawModule(code="").get_function("x")),
        ),
        "cudaErrorStreamCaptureImplicit": (lambda: runtime.memsetAsync(x.data.ptr, 0, 16, 0),),
    }
    for error, operations in rejected.items():
        for operation in operations:
            with stream:
                stream.begin_capture()
                with pytest.raises(runtime.CUDARuntimeError, match=error):
                    operation()
                for later in (lambda: x.fill(0), stream.end_capture):
                    with pytest.raises(runtime.CUDARuntimeError, match="cudaErrorStreamCaptureInvalidated"):
                        later()
    with pytest.raises(RuntimeError, match="legacy"):
        cupy.cuda.Stream.null.begin_capture()


def test_addresses_are_checked():
    device, host = cupy.zeros(4, np.float32), np.zeros(5, np.float32)
    kind = runtime.memcpyHostToDevice
    with pytest.raises(runtime.CUDARuntimeError, match="no allocation"):
        runtime.memcpyAsync(device.data.ptr, host.ctypes.data, 20, kind, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="said to be the host's"):
        runtime.memcpyAsync(device.data.ptr, device.data.ptr, 16, kind, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="no allocation"):
        runtime.memsetAsync(host.ctypes.data, 0, 4, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="overlap"):
        runtime.memcpyAsync(device.data.ptr, device.data.ptr + 4, 8, runtime.memcpyDeviceToDevice, 0)
    with pytest.raises(runtime.CUDARuntimeError, match="no stream"):
        runtime.memsetAsync(device.data.ptr, 0, 4, 12345)
