"""Computes the content of a debug state: the logits, loss and gradients of a model for one batch.

Two independent reference implementations compute them in float64: PyTorch with autograd, and the package's model with
the NumPy reference kernels. The results are rounded to float32.
"""

import importlib
import importlib.util
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from llmc_cli.data.encoding import encode_batch
from llmc_cli.data.tinyshakespeare import shakespeare_sections, shakespeare_text
from llmc_cli.errors import DataError, MissingError, UsageError
from llmc_cli.formats.shard import read_shard
from llmc_cli.formats.stream import check_ids
from llmc_cli.kernels.reference.kernels import ReferenceKernels
from llmc_cli.models.config import ModelConfig
from llmc_cli.models.gpt2 import GPT2
from llmc_cli.models.presets import GPT2_VOCAB_SIZE
from llmc_cli.tokenizer.tokenizer import load_tokenizer

Params = Mapping[str, NDArray[np.float32]]
Reference: TypeAlias = Literal["torch", "numpy"]

DEFAULT_DATA = Path("data/tinyshakespeare/tiny_shakespeare_val.bin")


class Batch(NamedTuple):
    inputs: NDArray[np.int32]  # (B, T)
    targets: NDArray[np.int32]  # (B, T)


class ReferenceValues(NamedTuple):
    logits: NDArray[np.float32]  # (B, T, V)
    loss: float  # the mean, in nats
    grads: dict[str, NDArray[np.float32]]  # gradients of the mean loss by tensor name, in the order of a model file


def load_batch(
    data: Path | None, config: ModelConfig, B: int, T: int, on_warning: Callable[[str], None] = lambda message: None
) -> Batch:
    """Read the first B·T + 1 tokens of a shard: the inputs, and the targets shifted by one.

    ``data`` defaults to Tiny Shakespeare's validation shard or, if that does not exist, to the bundled text, with a
    call of ``on_warning``. Raises UsageError if the bundled text does not match the model's vocabulary, DataError for
    a shard that is too short, and FormatError for one that is damaged or has another vocabulary.
    """
    count = B * T + 1
    if data is None and not DEFAULT_DATA.exists():
        if config.vocab_size != GPT2_VOCAB_SIZE:
            raise UsageError(
                f"--debug-state: found a model with a vocabulary of {config.vocab_size:,}, expected GPT-2's "
                f"{GPT2_VOCAB_SIZE:,} for the bundled text; give a shard for this model with --data"
            )
        on_warning(f"{DEFAULT_DATA}: file not found; using the bundled text instead (llmc prepro writes the file)")
        tokens, origin = _bundled_tokens(count), "the bundled text"
    else:
        shard = read_shard(data or DEFAULT_DATA)
        tokens, origin = shard.tokens[:count].astype(np.int32), str(shard.path)
        check_ids(origin, "tokens", tokens, config.vocab_size)
    if tokens.size < count:
        raise DataError(
            f"{origin}: found {tokens.size:,} tokens, expected {count:,} for a batch of {B} x {T}; "
            "use a smaller --batch or --seq-len"
        )
    return Batch(tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T))


def _bundled_tokens(count: int) -> NDArray[np.int32]:
    tokenizer = load_tokenizer("gpt2")
    # Each section has at least one token, its end-of-text token, so ``count`` sections are enough.
    sections = list(itertools.islice(shakespeare_sections(shakespeare_text("bundled").text), count))
    return encode_batch(tokenizer, sections)[:count]


def choose_reference(requested: Reference | None) -> Reference:
    """Return the requested reference; by default PyTorch if it is installed.

    Raises MissingError if PyTorch is requested but not installed.
    """
    installed = importlib.util.find_spec("torch") is not None
    if requested == "torch" and not installed:
        raise MissingError(
            "--reference torch: PyTorch is not installed; run pip install torch, or use --reference numpy"
        )
    return requested or ("torch" if installed else "numpy")


def compute(reference: Reference, config: ModelConfig, params: Params, batch: Batch) -> ReferenceValues:
    """Compute logits, loss and gradients of ``batch`` with the given reference."""
    return compute_torch(config, params, batch) if reference == "torch" else compute_numpy(config, params, batch)


def compute_numpy(config: ModelConfig, params: Params, batch: Batch) -> ReferenceValues:
    """Run the package's model with the reference kernels."""
    model = GPT2(config, ReferenceKernels())
    for name, view in params.items():
        model.params[name][...] = view
    B, T = batch.inputs.shape
    model.prepare(B, T)
    model.forward(batch.inputs)
    logits = model.logits(slice(None)).astype(np.float32).reshape(B, T, -1)
    model.backward(batch.targets, 1.0 / (B * T), acc=False)
    return ReferenceValues(
        logits, float(model.losses().mean()), {name: g.astype(np.float32) for name, g in model.grads.items()}
    )


def compute_torch(config: ModelConfig, params: Params, batch: Batch) -> ReferenceValues:
    """Run GPT-2 with PyTorch's operations and autograd."""
    # Any, so that type checking does not depend on whether PyTorch is installed
    torch: Any = importlib.import_module("torch")
    functional = torch.nn.functional
    weights = {name: torch.from_numpy(view).double().requires_grad_() for name, view in params.items()}
    wte = weights["wte"][: config.vocab_size]
    by_layer = {name: each.unbind() for name, each in weights.items() if name not in ("wte", "wpe", "lnfw", "lnfb")}
    C, NH, eps = config.channels, config.num_heads, config.norm_eps
    B, T = batch.inputs.shape
    inputs, targets = (torch.from_numpy(ids).long() for ids in batch)
    x = functional.embedding(inputs, wte) + weights["wpe"][:T]  # (B, T, C)
    for layer in range(config.num_layers):
        p = {name: parts[layer] for name, parts in by_layer.items()}
        normed = functional.layer_norm(x, (C,), p["ln1w"], p["ln1b"], eps)
        qkv = functional.linear(normed, p["qkvw"], p["qkvb"])  # (B, T, 3C)
        q, k, v = (part.view(B, T, NH, C // NH).transpose(1, 2) for part in qkv.split(C, dim=2))  # (B, NH, T, HS)
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        attention = attention.transpose(1, 2).reshape(B, T, C)
        x = x + functional.linear(attention, p["attprojw"], p["attprojb"])
        normed = functional.layer_norm(x, (C,), p["ln2w"], p["ln2b"], eps)
        hidden = functional.gelu(functional.linear(normed, p["fcw"], p["fcb"]), approximate="tanh")  # (B, T, 4C)
        x = x + functional.linear(hidden, p["fcprojw"], p["fcprojb"])
    x = functional.layer_norm(x, (C,), weights["lnfw"], weights["lnfb"], eps)
    logits = functional.linear(x, wte)  # (B, T, V)
    loss = functional.cross_entropy(logits.view(B * T, -1), targets.view(-1))
    loss.backward()
    grads = {name: each.grad.float().numpy() for name, each in weights.items() if each.grad is not None}
    return ReferenceValues(logits.detach().float().numpy(), loss.item(), grads)
