"""CUDA graphs of decoding and training on the fake CuPy: results are bit-identical to separate launches, rejected
captures are handled, and planted faults of the host code that affect only graphs are detected."""

import contextlib
import gc

import numpy as np
import pytest
from support.fake_cupy import cupy
from support.paths import FIXTURES

from llmc_cli.kernels.cuda import attention, blas, device, few_rows, replay
from llmc_cli.kernels.cuda.device import Device
from llmc_cli.kernels.cuda.kernels import CudaKernels
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.files import load_model
from llmc_cli.models.kv_cache import KVCache
from llmc_cli.sampling.generation import Decoder, generate, sample_tokens
from llmc_cli.sampling.options import SamplingOptions
from llmc_cli.training.optimizer import AdamW

MODEL = FIXTURES / "sampling_model.bin"
TOKENS = [4, 8, 15, 16, 23, 42, 7, 7]


@pytest.fixture
def open_kernels(monkeypatch, requires_gxx, fake_cupy):
    """Return open_kernels(precision), which opens the kernels on the fake CuPy with the emulator's checks enabled."""
    monkeypatch.setenv("LLMC_EMULATOR_CHECK", "1")
    return lambda precision="fp32": CudaKernels(Device(0, precision == "bf16"), precision)


def disable_graphs(monkeypatch):
    """Disable CUDA graphs."""
    monkeypatch.setattr(CudaKernels, "record", lambda self, work: work)


def compute_logits(decoder, tokens=TOKENS):
    """Return the logits after each token; all sequences get the same tokens."""
    decoder.cache.lengths[:] = 0
    return np.stack([decoder.step([token] * decoder.cache.S).copy() for token in tokens])


def new_decoder(model, S=1):
    return Decoder(model, KVCache(model.config, model.kernels, S, 16, S))


def count_launches(decoder):
    """Return the number of launches per token."""
    counts, kernels = [], decoder.model.kernels
    for token in TOKENS:
        before = kernels.device.launches
        decoder.step([token] * decoder.cache.S)
        counts.append(kernels.device.launches - before)
    return counts


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("S", [1, 3, few_rows.MAX_ROWS])
def test_graphs_give_the_same_bits(open_kernels, monkeypatch, precision, S):
    model = load_model(MODEL, open_kernels(precision))
    found = compute_logits(new_decoder(model, S))
    disable_graphs(monkeypatch)
    assert found.tobytes() == compute_logits(new_decoder(model, S)).tobytes()


def test_token_is_one_launch(open_kernels):
    model = load_model(MODEL, open_kernels())
    decoder = new_decoder(model)
    first, *others = count_launches(decoder)
    # two norms, four products and two for attention per layer; embedding, norm and head
    assert first == 8 * model.config.num_layers + 3
    assert others == [1] * (len(TOKENS) - 1)
    assert len(decoder._decode_token._graph._graph._nodes) == first


def test_greedy_decoding_matches_reference(open_kernels):
    greedy = SamplingOptions(temperature=0)
    expected = list(generate(load_model(MODEL, ReferenceKernels()), [1, 2, 3], greedy, 64))
    kernels = open_kernels()
    assert list(generate(load_model(MODEL, kernels), [1, 2, 3], greedy, 64)) == expected
    assert kernels.matmul._workspace is None  # cuBLAS is not used


def test_many_sequences_use_cublas(open_kernels):
    kernels = open_kernels()
    model = load_model(MODEL, kernels)
    decoder = new_decoder(model, few_rows.MAX_ROWS + 1)
    assert count_launches(decoder)[1:] == [1] * (len(TOKENS) - 1)
    assert kernels.matmul._workspace is not None
    few = compute_logits(new_decoder(model))
    assert np.abs(compute_logits(decoder) - few).max() < 1e-4


def train(model, steps=4, accumulated=2):
    """Train for a few steps with validation; return losses and gradient norms, and launch counts per step."""
    rng, device = np.random.default_rng(0), model.kernels.device
    B, T = model.B, model.T
    optimizer, found, launches = AdamW(model), [], []
    for step in range(steps):
        before = device.launches
        for micro in range(accumulated):
            ids, targets = rng.integers(0, 120, (2, B, T), np.int32)
            model.forward(ids)
            model.backward(targets, 1 / (B * T * accumulated), acc=micro > 0)
            found.append(model.losses().copy())
        found.append(optimizer.gradient_norm())
        optimizer.step(1e-3, step + 1)
        launches.append(device.launches - before)
        model.forward(ids)
        found.append(model.compute_losses(targets).copy())
    return np.concatenate([np.atleast_1d(each) for each in found]), launches


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [0, 2])
def test_training(open_kernels, monkeypatch, precision, recompute):
    """Graphs give the same bits with two launches per micro-step and those of the update."""
    runs = []
    for captured in (True, False):
        if not captured:
            disable_graphs(monkeypatch)
        model = load_model(MODEL, open_kernels(precision))
        for B, T in ((2, 9), (3, 5)):
            model.prepare(B, T, recompute=recompute)
            runs.append(train(model))
    for (found, launches), (expected, _) in zip(runs[:2], runs[2:], strict=True):
        assert found.tobytes() == expected.tobytes()
        update = 3 + (precision == "bf16")  # two for the norm, one for AdamW; in bf16, one rounds the weights
        assert launches[2:] == [2 * 2 + update] * 2
        assert launches[0] > 100


def test_deleted_model_frees_its_memory(open_kernels):
    kernels, pool = open_kernels(), cupy.get_default_memory_pool()

    def use():
        model = load_model(MODEL, kernels)
        model.prepare(2, 9)
        train(model)

    use()
    gc.collect()
    before = pool.used_bytes()
    gc.disable()
    try:
        use()
        assert pool.used_bytes() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replay_uses_updated_parameters(open_kernels, precision):
    model = load_model(MODEL, open_kernels(precision))
    decoder = new_decoder(model)
    before = compute_logits(decoder)
    with model.overwrite_params() as parameters:
        parameters.flat[:] *= np.float32(1.25)
    after = compute_logits(decoder)
    assert after.tobytes() == compute_logits(new_decoder(model)).tobytes()
    assert np.abs(after - before).max() > 0.1


def test_sampling_during_training(open_kernels):
    """Sampling twice from one cache gives the same results."""
    reference, model = load_model(MODEL, ReferenceKernels()), load_model(MODEL, open_kernels())
    cache = KVCache(model.config, model.kernels, 1, 12, 1)
    expected = sample_tokens(reference, KVCache(reference.config, reference.kernels, 1, 12, 1), 119, 12)
    assert sample_tokens(model, cache, 119, 12) == expected
    assert sample_tokens(model, cache, 119, 12) == expected


def test_batches_of_samples(open_kernels, monkeypatch):
    """Samples do not depend on the number of sequences per batch."""
    reference, model = load_model(MODEL, ReferenceKernels()), load_model(MODEL, open_kernels())
    for together in (1, 2, 5):
        monkeypatch.setattr("llmc_cli.sampling.generation.MAX_BATCH", together)
        expected, found = (list(generate(each, [1, 2, 3], SamplingOptions(), 6, 5)) for each in (reference, model))
        assert sorted(map(repr, found)) == sorted(map(repr, expected))


def test_deleted_decoder_frees_its_memory(open_kernels):
    """Memory is freed immediately, not by the garbage collector, since a cache may take a gigabyte."""
    model = load_model(MODEL, open_kernels())
    compute_logits(new_decoder(model))
    pool = cupy.get_default_memory_pool()
    gc.collect()
    before = pool.used_bytes()
    gc.disable()
    try:
        compute_logits(new_decoder(model))
        assert pool.used_bytes() == before
    finally:
        gc.enable()


class NormGradient:
    """An operation with scratch memory and no matrix product, whose gradients are compared with the reference."""

    def __init__(self, kernels, N=5, C=16):
        rng, self.kernels = np.random.default_rng(0), kernels
        inputs = [rng.standard_normal(shape) for shape in ((N, C), (N, C), N, N, C)]  # dy, res, mean, rstd, w
        self.outputs = [kernels.alloc(shape, np.float32) for shape in ((N, C), (C,), (C,))]
        arrays = [kernels.alloc(each.shape, np.float32) for each in inputs]
        for array, values in zip(arrays, inputs, strict=True):
            kernels.upload(array, values)
        self.work = lambda: kernels.residual_norm_backward(*self.outputs, *arrays, None, False)
        self.expected = [np.empty(each.shape) for each in self.outputs]
        ReferenceKernels().residual_norm_backward(*self.expected, *inputs, None, False)

    def check(self, call):
        for array in self.outputs:
            self.kernels.upload(array, np.full(array.shape, np.nan))
        call()
        for array, expected in zip(self.outputs, self.expected, strict=True):
            np.testing.assert_allclose(self.kernels.download(array), expected, rtol=1e-4, atol=1e-5)


def check_scratch_memory_growth(kernels):
    """A graph keeps using the scratch memory that it was captured with."""
    small = NormGradient(kernels)
    recorded = kernels.record(small.work)
    for _ in range(3):
        small.check(recorded)
    large = NormGradient(kernels, 300, 64)
    held = kernels.scratch("parts", (1,))
    large.check(large.work)
    assert kernels.scratch("parts", (1,)).data.ptr != held.data.ptr
    del held
    small.check(recorded)
    large.check(large.work)


def test_scratch_memory_grows_after_capture(open_kernels):
    check_scratch_memory_growth(open_kernels())


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda kernels: kernels.alloc((3,), np.float32), "cannot allocate memory during CUDA graph capture"),
        (
            lambda kernels: kernels.upload(kernels.number, np.ones(1)),
            "cannot upload values from the host",
        ),
        (lambda kernels: kernels.download(kernels.number), "cudaErrorStreamCaptureUnsupported"),
        (lambda kernels: kernels.synchronize(), "cudaErrorStreamCaptureUnsupported"),
        (
            lambda kernels: kernels.sum_squares(kernels.number, kernels.number),
            "cannot allocate memory|cannot load a kernel",
        ),
        (lambda kernels: kernels.matmul(*[kernels.number.reshape(1, 1)] * 3, False, False), "cannot allocate memory"),
    ],
    ids=["alloc", "upload", "download", "synchronize", "new kernel", "cuBLAS"],
)
def test_operations_not_allowed_during_capture(open_kernels, operation, message):
    """Such an operation raises an error if it first occurs during capture. Later calls work."""
    kernels = open_kernels()
    kernels.number = kernels.alloc((1,), np.float32)
    gradient, calls = NormGradient(kernels), []

    def work():
        gradient.work()
        calls.append(None)
        if len(calls) > 1:
            operation(kernels)

    recorded = kernels.record(work)
    gradient.check(recorded)
    with pytest.raises((RuntimeError, UserWarning), match=message):
        recorded()
    recorded = kernels.record(gradient.work)
    for _ in range(3):
        gradient.check(recorded)


def reject_capture(monkeypatch):
    def reject(stream):
        raise cupy.cuda.runtime.CUDARuntimeError(900)

    monkeypatch.setattr(cupy.cuda.Stream, "begin_capture", reject)


def invalidate_capture(monkeypatch):
    """Invalidate the capture silently; the next kernel launch raises a driver error."""
    original = cupy.cuda.Stream.begin_capture

    def begin_and_invalidate(stream):
        original(stream)
        with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
            stream.synchronize()

    monkeypatch.setattr(cupy.cuda.Stream, "begin_capture", begin_and_invalidate)


@pytest.mark.parametrize("prevent_capture", [reject_capture, invalidate_capture])
def test_rejected_capture_falls_back_with_a_warning(open_kernels, monkeypatch, prevent_capture):
    """The warning is issued once, and the results are the same."""
    kernels = open_kernels()
    gradient = NormGradient(kernels)
    recorded = kernels.record(gradient.work)
    gradient.check(recorded)

    prevent_capture(monkeypatch)
    with pytest.warns(UserWarning, match="CUDA graph capture failed, kernels are launched one by one"):
        gradient.check(recorded)
    for _ in range(2):
        before = kernels.device.launches
        gradient.check(recorded)
        assert kernels.device.launches > before + 1


# Planted faults: each breaks the host code in a way that shows only with graphs; a check must fail.


def check_tokens(kernels):
    reference = compute_logits(new_decoder(load_model(MODEL, ReferenceKernels())))
    decoder = new_decoder(load_model(MODEL, kernels))
    for _ in range(2):
        assert np.abs(compute_logits(decoder) - reference).max() < 1e-4


def sequence_lengths_fixed_at_capture(monkeypatch):
    """The host chooses the array of sequence lengths for each token, so a graph keeps that of the captured token."""
    original, arrays = attention.attention_cached, []

    def patched(device, out, keys, values, qkv, lengths, num_heads):
        while len(arrays) < 16:
            arrays.append(device.alloc(lengths.shape, np.int32))
            device.upload(arrays[-1], np.full(lengths.shape, len(arrays) - 1))
        # the second token is captured
        length = int(device.download(lengths)[0]) if device._captured is None else 1
        original(device, out, keys, values, qkv, arrays[length], num_heads)

    monkeypatch.setattr(attention, "attention_cached", patched)


def inputs_reallocated_each_token(monkeypatch):
    original = KVCache.append

    def append(self, ids):
        self._inputs = self.kernels.alloc(self._inputs.shape, np.int32)
        original(self, ids)

    monkeypatch.setattr(KVCache, "append", append)


def graph_launched_on_another_stream(monkeypatch):
    monkeypatch.setattr(device.Graph, "launch", lambda self: self._graph.launch(cupy.cuda.Stream.null))


def graph_not_launched(monkeypatch):
    monkeypatch.setattr(device.Graph, "launch", lambda self: None)


def captured_without_warm_up(monkeypatch):
    original = replay.Replayable.__init__

    def init(self, *arguments):
        original(self, *arguments)
        self._warm = True

    monkeypatch.setattr(replay.Replayable, "__init__", init)


def workspace_reset(monkeypatch):
    monkeypatch.setattr(few_rows, "MAX_ROWS", 0)
    original = blas.Blas._configure

    def configure(self):
        original(self)
        self._call("cublasSetStream_v2", self._device.stream.ptr)

    monkeypatch.setattr(blas.Blas, "_configure", configure)


def graph_memory_released(monkeypatch):
    original = device.Graph.__init__
    monkeypatch.setattr(device.Graph, "__init__", lambda self, device, graph, memory: original(self, device, graph, []))


FAULTS = [
    (sequence_lengths_fixed_at_capture, check_tokens, AssertionError, None),
    (inputs_reallocated_each_token, check_tokens, AssertionError, None),
    (graph_launched_on_another_stream, check_tokens, AssertionError, None),
    (graph_not_launched, check_tokens, AssertionError, None),
    (captured_without_warm_up, check_tokens, RuntimeError, "cannot load a kernel during CUDA graph capture"),
    (workspace_reset, check_tokens, UserWarning, "cublasGemmEx failed with cuBLAS status 7"),
    (graph_memory_released, check_scratch_memory_growth, RuntimeError, "memory that has been freed"),
]


@pytest.mark.parametrize(("fault", "check", "error", "message"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_planted_fault_is_detected(open_kernels, monkeypatch, fault, check, error, message):
    fault(monkeypatch)
    kernels = open_kernels()
    with pytest.raises(error, match=message):
        check(kernels)


@pytest.mark.parametrize(
    "fault", [sequence_lengths_fixed_at_capture, inputs_reallocated_each_token], ids=lambda each: each.__name__
)
def test_faults_do_not_show_without_graphs(open_kernels, monkeypatch, fault):
    fault(monkeypatch)
    disable_graphs(monkeypatch)
    check_tokens(open_kernels())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("S", [1, few_rows.MAX_ROWS + 1], ids=["few rows", "cuBLAS"])
def test_graphs_on_a_gpu(monkeypatch, precision, S):
    model = load_model(MODEL, CudaKernels(Device(0, precision == "bf16"), precision))
    decoder = new_decoder(model, S)
    assert count_launches(decoder)[1:] == [1] * (len(TOKENS) - 1)
    found = compute_logits(decoder)
    disable_graphs(monkeypatch)
    assert found.tobytes() == compute_logits(new_decoder(model, S)).tobytes()
