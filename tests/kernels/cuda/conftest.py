import numpy as np
import pytest


@pytest.fixture
def clear_streams():
    """Discard work still pending in the streams of the fake CuPy after the test."""
    from support.fake_cupy import cupy

    yield
    cupy.cuda.stream.discard_pending()


@pytest.fixture
def fake_cupy(monkeypatch, clear_streams):
    """Make the CUDA backend use the fake CuPy instead of the real one."""
    from support.fake_cupy import cupy

    from llmc_cli.kernels.cuda import device

    monkeypatch.setattr(device, "_import_cupy", lambda: cupy)
    device._stream.cache_clear()
    yield
    device._stream.cache_clear()
    cupy.cuda.Stream.null.use()


@pytest.fixture
def double(monkeypatch):
    """Return double(array), which launches a fake kernel that doubles the array's elements."""
    from support.fake_cupy import doubling_kernel

    kernel = doubling_kernel(monkeypatch)
    return lambda x, **options: kernel((1,), (32,), (x, np.int32(x.size), np.int64(0), np.float32(0)), **options)
