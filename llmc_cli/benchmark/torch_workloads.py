"""The workloads of ``bench`` in idiomatic PyTorch. Imported only by the worker process that runs PyTorch.

The model uses ``nn`` modules, scaled-dot-product attention and a head tied to the embedding; AdamW is fused and
gradients are clipped by norm. With ``precision`` "bf16", training keeps float32 weights and runs the forward pass and
the loss under ``torch.autocast``. ``device`` is "cpu", "cuda" or "cuda:N"; on CUDA every run ends with a
synchronization.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmc_cli.benchmark.job import Job
from llmc_cli.benchmark.torch_gpt2 import GPT2
from llmc_cli.benchmark.workloads import LR, TOKENS, WEIGHT_DECAY, Detail, Task, Workload, model_sizes
from llmc_cli.errors import MissingError
from llmc_cli.kernels.backend import SAMPLING_PRECISIONS
from llmc_cli.kernels.operation import Sizes
from llmc_cli.kernels.operations import model_uses
from llmc_cli.kernels.random_arrays import SEED
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.initialization import INIT_STD

MODES = {"torch compiled": "default", "torch graphs": "reduce-overhead"}
"""The mode of ``torch.compile`` by implementation. "reduce-overhead" uses CUDA graphs, as llmc does in sampling."""


def autocast(precision: str, device: str) -> torch.autocast:
    """Return the autocast context for ``precision``."""
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=precision == "bf16")


def is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def wait_for(device: str) -> None:
    """Synchronize with ``device``."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


class TrainWorkload:
    """Training steps on one batch, compiled with ``mode`` if it is not None."""

    tasks: tuple[str, ...] = ("step",)

    def __init__(
        self, config: ModelConfig, B: int, T: int, mode: str | None, precision: str = "fp32", device: str = "cpu"
    ) -> None:
        self.precision, self.device = precision, device
        model = GPT2(config)
        self.parameters = list(model.parameters())
        matrices = [parameter for parameter in self.parameters if parameter.dim() == 2]
        vectors = [parameter for parameter in self.parameters if parameter.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
            lr=LR,
            betas=(0.9, 0.95),
            eps=1e-8,
            fused=True,
        )
        self.model: Callable[..., Tensor] = torch.compile(model, mode=mode) if mode else model
        ids = torch.randint(config.vocab_size, (B, T + 1))
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def prepare(self, task: str) -> Task:
        return Task(self.step)

    def step(self) -> Detail:
        with autocast(self.precision, self.device):
            loss = self.model(self.inputs, self.targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait_for(self.device)
        return {"loss": loss.item(), "norm": norm.item()}


class Sampler:
    """Greedy sampling of B sequences after T positions in the cache."""

    def __init__(
        self, config: ModelConfig, B: int, T: int, mode: str | None, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.device = device
        model = GPT2(config).eval().to(dtype)
        self.T, self.tokens = T, min(TOKENS, config.max_seq_len - T)
        shape = (B, config.num_heads, T + self.tokens, config.head_size)
        self.keys, self.values = ([torch.randn(shape, dtype=dtype) for _ in range(config.num_layers)] for _ in range(2))
        self.position = torch.tensor([T])
        self.extend: Callable[..., Tensor] = torch.compile(model.extend, mode=mode) if mode else model.extend
        if mode == MODES["torch graphs"]:
            for cache in (*self.keys, *self.values):  # mutated inputs would disable CUDA graphs
                torch._dynamo.mark_static_address(cache)
        self.start = torch.zeros((B, 1), dtype=torch.int64)

    @torch.inference_mode()
    def run(self) -> Detail:
        self.position[0] = self.T
        tokens = self.start
        for _ in range(self.tokens):
            tokens = self.extend(tokens, self.keys, self.values, self.position).argmax(-1, keepdim=True)
            self.position += 1
        wait_for(self.device)
        return None


class TransformersSampler:
    """The same with transformers' ``generate``."""

    def __init__(self, config: ModelConfig, B: int, T: int, dtype: torch.dtype, device: str = "cpu") -> None:
        import transformers

        self.device = device
        model_config = transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.max_seq_len, n_embd=config.channels,
            n_layer=config.num_layers, n_head=config.num_heads, layer_norm_epsilon=config.norm_eps,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model: Any = transformers.GPT2LMHeadModel(model_config)
        self.model = model.eval().to(dtype)
        self.T, self.tokens = T, min(TOKENS, config.max_seq_len - T)
        self.cache: Any = transformers.DynamicCache(config=model_config)
        shape = (B, config.num_heads, T, config.head_size)
        for layer in range(config.num_layers):
            self.cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)
        self.ids = torch.zeros((B, T + 1), dtype=torch.int64)

    @torch.inference_mode()
    def run(self) -> Detail:
        if added := self.cache.get_seq_length() - self.T:  # by the previous run
            self.cache.crop(-added)
        ids = self.model.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, pad_token_id=0,
            do_sample=False, min_new_tokens=self.tokens, max_new_tokens=self.tokens,
        )  # fmt: skip
        assert ids.shape[1] == self.ids.shape[1] + self.tokens
        wait_for(self.device)
        return None


class SampleWorkload:
    """The tasks of llmc, one per precision of the weights.

    "token bf16" runs in bfloat16 if ``precisions`` contains "bf16"; all others run in float32.
    """

    tasks: tuple[str, ...] = tuple(f"token {precision}" for precision in SAMPLING_PRECISIONS[1:])

    def __init__(self, create: Callable[[torch.dtype], Sampler | TransformersSampler], precisions: list[str]) -> None:
        self._create, self._precisions = create, precisions
        self._samplers: dict[torch.dtype, Sampler | TransformersSampler] = {}  # at most one

    def prepare(self, task: str) -> Task:
        bf16 = task == "token bf16" and "bf16" in self._precisions
        dtype = torch.bfloat16 if bf16 else torch.float32
        if dtype not in self._samplers:
            self._samplers.clear()  # free its memory first
            self._samplers[dtype] = self._create(dtype)
        sampler = self._samplers[dtype]
        return Task(sampler.run, parts=sampler.tokens)


class KernelsWorkload:
    """What PyTorch runs in place of each operation, by the names and shapes of ``operations``.

    Each method named after an operation returns the call to time; an operation without a method has no equivalent. A
    backward pass is timed without its forward pass. Biases are added with the matrix product, where llmc leaves some
    to the next norm. In bf16 an input is float32 or bfloat16 and weights are cast, as in a training step under
    autocast.
    """

    def __init__(self, config: ModelConfig, B: int, T: int, precision: str = "fp32", device: str = "cpu") -> None:
        self.B, self.T, self.config, self.precision, self.device = B, T, config, precision, device
        self.linear_dtype = torch.bfloat16 if precision == "bf16" else torch.float32  # of a linear layer's output
        uses = model_uses(model_sizes(config, B, T))
        self._uses = {task: (name, sizes) for name, task, sizes in uses if hasattr(self, name)}
        self.tasks = tuple(self._uses)

    def prepare(self, task: str) -> Task:
        name, sizes = self._uses[task]
        with torch.device(self.device):
            run = getattr(self, name)(task, sizes)

        def once() -> Detail:
            run()
            wait_for(self.device)
            return None

        return Task(once)

    def _forward(self, function: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:  # records the graph for backward, as in training
            with autocast(self.precision, self.device):
                return function()

        return run

    def _backward(self, function: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
        output = self._forward(function, inputs)()
        upstream = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, inputs, upstream, retain_graph=True)

    @staticmethod
    def _leaf(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape) * std).to(dtype).requires_grad_()

    def embedding_forward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        C, V = self.config.channels, self.config.vocab_size
        wte, wpe = self._leaf(V, C), self._leaf(self.config.max_seq_len, C)
        ids, positions = torch.randint(V, (self.B, self.T)), torch.arange(self.T)
        return self._forward(lambda: F.embedding(ids, wte) + F.embedding(positions, wpe), [wte, wpe])

    # no embedding_backward: PyTorch makes a whole table of gradients, llmc adds to the one the head has written

    def _norm(self) -> tuple[Callable[[], Tensor], list[Tensor]]:
        C = self.config.channels
        x, delta = self._leaf(self.B, self.T, C), self._leaf(self.B, self.T, C, dtype=self.linear_dtype)
        w, b = self._leaf(C), self._leaf(C)
        return lambda: F.layer_norm(x + delta, (C,), w, b, self.config.norm_eps), [x, delta, w, b]

    def residual_norm_forward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        return self._forward(*self._norm())

    def residual_norm_backward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        return self._backward(*self._norm())

    def _linear(self, task: str, sizes: Sizes) -> tuple[Callable[[], Tensor], list[Tensor]]:
        after_norm = task.endswith((" qkv", " fc"))  # LayerNorm returns float32 under autocast
        N, I, O = (sizes[axis] for axis in "NIO")  # noqa: E741
        x = self._leaf(N, I, dtype=torch.float32 if after_norm else self.linear_dtype)
        w, b = self._leaf(O, I, std=INIT_STD), self._leaf(O)
        return lambda: F.linear(x, w, b), [x, w, b]

    def linear_forward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        return self._forward(*self._linear(task, sizes))

    def linear_backward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        return self._backward(*self._linear(task, sizes))

    def linear_gelu_forward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        linear, inputs = self._linear(task, sizes)
        return self._forward(lambda: F.gelu(linear(), approximate="tanh"), inputs)

    def gelu_forward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        pre = self._leaf(sizes["N"], sizes["O"], dtype=self.linear_dtype)
        return self._forward(lambda: F.gelu(pre, approximate="tanh"), [pre])

    def gelu_linear_backward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        N, I, O = (sizes[axis] for axis in "NIO")  # noqa: E741
        pre, w, b = self._leaf(N, I, dtype=self.linear_dtype), self._leaf(O, I, std=INIT_STD), self._leaf(O)
        return self._backward(lambda: F.linear(F.gelu(pre, approximate="tanh"), w, b), [pre, w, b])

    def _attention(self) -> tuple[Callable[[], Tensor], list[Tensor]]:
        B, T, C, NH = self.B, self.T, self.config.channels, self.config.num_heads
        qkv = self._leaf(B, T, 3 * C, dtype=self.linear_dtype)

        def attend() -> Tensor:
            q, k, v = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in qkv.split(C, dim=2))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)

        return attend, [qkv]

    def attention_forward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        return self._forward(*self._attention())

    def attention_backward(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        return self._backward(*self._attention())

    # no attention_cached: it is part of ``SampleWorkload``

    def head_loss(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        N, C, V = sizes["N"], self.config.channels, self.config.vocab_size
        x, w, targets = self._leaf(N, C), self._leaf(V, C, std=INIT_STD), torch.randint(V, (N,))
        loss = self._forward(lambda: F.cross_entropy(F.linear(x, w), targets), [x, w])
        return (lambda: torch.autograd.grad(loss(), [x, w])) if task.endswith(" gradient") else loss

    def head_logits(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        x = torch.randn(sizes["N"], self.config.channels).to(self.linear_dtype)
        w = (torch.randn(self.config.vocab_size, self.config.channels) * INIT_STD).to(self.linear_dtype)
        return torch.inference_mode()(lambda: F.linear(x, w))

    def _parameters(self) -> list[Tensor]:
        parameters = list(GPT2(self.config).parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * INIT_STD
        return [*parameters]

    def sum_squares(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        return lambda: torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()

    def adamw(self, task: str, sizes: Sizes) -> Callable[[], Any]:
        return torch.optim.AdamW(self._parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True).step


def reserved_memory() -> int:
    """Return the peak bytes of GPU memory reserved by PyTorch since the last ``release``."""
    return torch.cuda.max_memory_reserved()


def release() -> None:
    """Return PyTorch's cached GPU memory to the device and reset the peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def open_torch(job: Job) -> tuple[Workload, dict[str, Any]]:
    """Return PyTorch's workload for ``job`` and its configuration.

    With a compiled implementation the first task is compiled here; when sampling, other precisions are compiled when
    first run. Raises MissingError if ``job`` requires a GPU and PyTorch finds none.
    """
    device = job.device if is_cuda(job.device) else "cpu"
    if is_cuda(device):
        _select_device(device, job.precision)
    torch.manual_seed(SEED)
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    mode = MODES.get(job.implementation)
    with torch.device(device):
        workload = _workload(job, mode, device)
    if mode:
        first = f"token {job.precision.split()[0]}" if job.section == "sample" else workload.tasks[0]
        workload.prepare(first).run()
    configuration = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": job.precision,
        "optimizer": "AdamW, fused",
        "attention": "scaled_dot_product_attention",
        "mode": f"torch.compile, {mode}" if mode else "generate" if job.implementation == "transformers" else "eager",
        "blas": "cuBLAS" if is_cuda(device) else "MKL" if torch.backends.mkl.is_available() else "no MKL",
    }
    if is_cuda(device):
        configuration |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return workload, configuration


def _select_device(device: str, precision: str) -> None:
    """Select the GPU and the same float32 matmul precision as llmc's. Raises MissingError if there is no GPU."""
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = f"it is built for CUDA {built}, which may require a newer driver" if built else "built without CUDA"
        raise MissingError(f"PyTorch {torch.__version__} finds no CUDA device: {reason}")
    torch.cuda.set_device(torch.device(device) if ":" in device else 0)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def _workload(job: Job, mode: str | None, device: str) -> Workload:
    config, B, T = job.config, job.batch, job.seq_len
    if job.section == "train":
        return TrainWorkload(config, B, T, mode, job.precision, device)
    if job.section == "kernels":
        return KernelsWorkload(config, B, T, job.precision, device)

    def create(dtype: torch.dtype) -> Sampler | TransformersSampler:
        with torch.device(device):
            if job.implementation == "transformers":
                return TransformersSampler(config, B, T, dtype, device)
            return Sampler(config, B, T, mode, dtype, device)

    return SampleWorkload(create, job.precision.split())
