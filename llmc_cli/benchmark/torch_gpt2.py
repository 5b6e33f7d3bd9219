"""GPT-2 (Radford et al. 2019) in idiomatic PyTorch. Imported only by the worker process that runs PyTorch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmc_cli.models.config import ModelConfig
from llmc_cli.models.initialization import INIT_STD


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each added to the residual stream x (B,T,C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.channels
        self.num_heads = config.num_heads
        self.ln1, self.ln2 = nn.LayerNorm(C, config.norm_eps), nn.LayerNorm(C, config.norm_eps)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def heads(self, x: Tensor) -> list[Tensor]:
        """Return q, k and v (B,NH,T,HS)."""
        B, T, C = x.shape
        qkv = self.qkv(self.ln1(x)).split(C, dim=2)
        return [part.view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2) for part in qkv]

    def join(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the residual stream after both branches, given the attention's output (B,NH,T,HS)."""
        x = x + self.attproj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        return self.join(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def extend(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Apply the block to one new position (B,1,C) and write it to keys and values (B,NH,Tmax,HS)."""
        q, k, v = self.heads(x)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        return self.join(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=mask))


class GPT2(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.channels)
        self.wpe = nn.Embedding(config.max_seq_len, config.channels)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.lnf = nn.LayerNorm(config.channels, config.norm_eps)
        self.head = nn.Linear(config.channels, config.vocab_size, bias=False)
        self.head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of targets (B,T)."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.lnf(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def extend(self, ids: Tensor, keys: list[Tensor], values: list[Tensor], position: Tensor) -> Tensor:
        """Return the logits (B,V) after one new token (B,1) at position (1,).

        keys and values are lists of one (B,NH,Tmax,HS) array per layer; with views into one array for all layers,
        ``torch.compile`` would copy the whole array for every token.
        """
        mask = (torch.arange(keys[0].shape[2], device=ids.device) <= position)[None, None, None]
        x = self.wte(ids) + self.wpe(position)
        for layer, block in enumerate(self.blocks):
            x = block.extend(x, keys[layer], values[layer], position, mask)
        return self.head(self.lnf(x))[:, -1]
