"""What a model makes of one batch, from a reference: the content of a debug state.

Two references compute the same in float64, from code that has nothing in common: PyTorch, with its own gradients, and
the model on the reference kernels. The values are rounded to float32 at the end.
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

DATA = Path("data/tinyshakespeare/tiny_shakespeare_val.bin")


class Batch(NamedTuple):
    inputs: NDArray[np.int32]  # (B, T)
    targets: NDArray[np.int32]  # (B, T)


class Values(NamedTuple):
    logits: NDArray[np.float32]  # (B, T, V)
    loss: float  # the mean, in nats
    grads: dict[str, NDArray[np.float32]]  # of the mean loss, by name, in the order of a model file


def take_batch(
    data: Path | None, config: ModelConfig, B: int, T: int, on_shortfall: Callable[[str], None] = lambda why: None
) -> Batch:
    """The first B·T tokens of a shard, and those one further.

    Without ``data`` it is Tiny Shakespeare's validation shard, and where that is not there either, the bundled text,
    which ``on_shortfall`` is told. Raises UsageError where neither fits the model, DataError for a shard that is too
    short, FormatError for one that is damaged or of another vocabulary.
    """
    count = B * T + 1
    if data is None and not DATA.exists():
        if config.vocab_size != GPT2_VOCAB_SIZE:
            raise UsageError(f"a vocabulary of {config.vocab_size} is not GPT-2's: give tokens of this model by --data")
        on_shortfall(f"{DATA}: not there, so the first tokens of the bundled text are used; see llmc prepro")
        tokens, where = _bundled_tokens(count), "the bundled text"
    else:
        shard = read_shard(data or DATA)
        tokens, where = shard.tokens[:count].astype(np.int32), str(shard.path)
        check_ids(where, "tokens", tokens, config.vocab_size)
    if tokens.size < count:
        raise DataError(f"{where}: found {tokens.size:,} tokens, expected {count:,} for a batch of {B} x {T}")
    return Batch(tokens[:-1].reshape(B, T), tokens[1:].reshape(B, T))


def _bundled_tokens(count: int) -> NDArray[np.int32]:
    tokenizer = load_tokenizer("gpt2")
    # A document is a token at least: its end-of-text.
    sections = list(itertools.islice(shakespeare_sections(shakespeare_text("bundled").text), count))
    return encode_batch(tokenizer, sections)[:count]


def choose_reference(wanted: Reference | None) -> Reference:
    """The reference asked for, else PyTorch where it is installed. MissingError where it is asked for and is not."""
    installed = importlib.util.find_spec("torch") is not None
    if wanted == "torch" and not installed:
        raise MissingError("--reference torch: PyTorch is not installed: pip install torch, or --reference numpy")
    return wanted or ("torch" if installed else "numpy")


def compute(reference: Reference, config: ModelConfig, params: Params, batch: Batch) -> Values:
    """Logits, loss and gradients of ``batch`` by one of the references."""
    return by_torch(config, params, batch) if reference == "torch" else by_numpy(config, params, batch)


def by_numpy(config: ModelConfig, params: Params, batch: Batch) -> Values:
    """The model on the reference kernels."""
    model = GPT2(config, ReferenceKernels())
    for name, view in params.items():
        model.params[name][...] = view
    B, T = batch.inputs.shape
    model.prepare(B, T)
    model.forward(batch.inputs)
    logits = model.logits(slice(None)).astype(np.float32).reshape(B, T, -1)
    model.backward(batch.targets, 1.0 / (B * T), acc=False)
    return Values(logits, float(model.losses().mean()), {name: g.astype(np.float32) for name, g in model.grads.items()})


def by_torch(config: ModelConfig, params: Params, batch: Batch) -> Values:
    """GPT-2 in PyTorch's own operations, differentiated by PyTorch."""
    # untyped, so that the types are checked the same with and without it
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
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(B, T, C)
        x = x + functional.linear(mixed, p["attprojw"], p["attprojb"])
        normed = functional.layer_norm(x, (C,), p["ln2w"], p["ln2b"], eps)
        hidden = functional.gelu(functional.linear(normed, p["fcw"], p["fcb"]), approximate="tanh")  # (B, T, 4C)
        x = x + functional.linear(hidden, p["fcprojw"], p["fcprojb"])
    x = functional.layer_norm(x, (C,), weights["lnfw"], weights["lnfb"], eps)
    logits = functional.linear(x, wte)  # (B, T, V)
    loss = functional.cross_entropy(logits.view(B * T, -1), targets.view(-1))
    loss.backward()
    grads = {name: each.grad.float().numpy() for name, each in weights.items() if each.grad is not None}
    return Values(logits.detach().float().numpy(), loss.item(), grads)
