"""Multi-head latent attention (arXiv 2405.04434): caches one small vector per token, from which all heads are made.

    python labs/latent_attention.py

Measured: config/tiny.py with 4 heads of 16 channels (200 steps, characters of the standard library), 3 seeds, which
differ by 0.031 on average. Last column: bytes per token in the cache, in float32.

                        bits per byte  - baseline  bytes a token
    4 heads                     3.299              1,024
    1 key/value head            3.275      -0.025  256
    latent of 32                3.440      +0.141  320
    latent of 16                3.478      +0.178  192

Conclusion: a latent makes the cache a third or a fifth as large. Here it raises the loss more than sharing one
key/value head, which costs nothing that three seeds could show. With 64 channels heads have little to share. The paper
compares models thousands of channels wide, where one key/value head is worse and the latent is not.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lab import Variants, main, model

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass
class GPTConfig(model.GPTConfig):
    kv_rank: int = 0  # channels of the latent that keys and values are made from; 0: plain attention
    rope_size: int = 16  # channels of a key that carry its position; all heads share them


class LatentAttention(nn.Module):
    """Attention whose cache holds the latent and the rotated part of the key: kv_rank + rope_size numbers per token.

    A head's key has head_size channels made from the latent, followed by the rotated channels that all heads share.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        H, D, R = config.n_head, config.head_size, config.rope_size
        self.layer, self.dropout, self.rank, self.shape = layer, config.dropout, config.kv_rank, (H, D, R)
        self.query = nn.Linear(config.n_embd, H * (D + R), bias=False)
        self.compress = nn.Linear(config.n_embd, config.kv_rank + R, bias=False)
        self.latent_norm = model.RMSNorm(config.kv_rank, eps=config.norm_eps)
        self.expand = nn.Linear(config.kv_rank, H * 2 * D, bias=False)
        self.out = nn.Linear(H * D, config.n_embd, bias=False)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, rotation: list[Tensor], cache: Any) -> Tensor:
        (B, T, _), (H, D, R) = x.shape, self.shape
        q, turned = self.query(x).view(B, T, H, D + R).transpose(1, 2).split_with_sizes([D, R], -1)
        q = torch.cat((q, model.rotate(turned, *rotation)), -1)  # (B, H, T, D + R)
        latent, shared = self.compress(x)[:, None].split_with_sizes([self.rank, R], -1)
        latent, shared = self.latent_norm(latent), model.rotate(shared, *rotation)  # (B, 1, T, ...)
        if cache is not None:  # it has two buffers of the same size, with half of the numbers in each
            held = cache.update(self.layer, positions, *torch.cat((latent, shared), -1).chunk(2, -1))
            latent, shared = torch.cat(held, -1).split_with_sizes([self.rank, R], -1)
        S = latent.shape[2]
        k, v = self.expand(latent).view(B, S, H, 2 * D).transpose(1, 2).chunk(2, -1)  # (B, H, S, D)
        k = torch.cat((k, shared.expand(B, H, S, R)), -1)
        y = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout if self.training else 0.0, is_causal=mask is None and T > 1
        )
        return F.dropout(self.out(y.transpose(1, 2).reshape(B, T, -1)), self.dropout, self.training)


class Block(model.Block):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        if config.kv_rank:
            self.attention = LatentAttention(config, layer)  # type: ignore[assignment]


class GPT(model.GPT):
    """model.GPT with rotary tables for only the rotated channels, and a cache of latents."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        if config.kv_rank:
            frequencies = model.rotary_frequencies(dataclasses.replace(config, head_size=config.rope_size))
            turn = torch.outer(torch.arange(config.block_size).float(), frequencies)
            self.rope_cos = turn.cos().repeat(1, 2)
            self.rope_sin = torch.cat((-turn.sin(), turn.sin()), dim=1)

    def make_cache(self, batch_size: int, max_length: int = 0) -> model.KVCache:
        if not self.config.kv_rank:  # type: ignore[attr-defined]
            return super().make_cache(batch_size, max_length)
        half = (self.config.kv_rank + self.config.rope_size) // 2  # type: ignore[attr-defined]
        shape = dataclasses.replace(self.config, n_kv_head=1, head_size=half)
        return model.KVCache(shape, batch_size, max_length, next(self.parameters()))


COMMON = ("--n_head=4", "--no-qk_norm")
VARIANTS: Variants = {
    "4 heads": {},
    "1 key/value head": dict(n_kv_head=1),
    "latent of 32": dict(kv_rank=32, rope_size=8),
    "latent of 16": dict(kv_rank=16, rope_size=8),
}

MEASURES = {"bytes a token": lambda trained: f"{4 * trained.make_cache(1, 1).memory.numel():,}"}

if __name__ == "__main__":
    main(__doc__ or "", __file__, VARIANTS, MEASURES, COMMON, Block=Block, GPT=GPT, GPTConfig=GPTConfig)
