"""Validation: one full, deterministic pass that draws nothing and changes nothing."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nib.data.dataset import TokenStream, validation_batch, validation_windows
from nib.training.distributed import Cluster


@dataclass
class Validation:
    """What a pass over a split found. `loss` is in nats per token."""

    loss: float
    bits_per_byte: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    def __str__(self) -> str:
        return (
            f"validation loss {self.loss:.4f}, {self.bits_per_byte:.4f} bits per byte, perplexity {self.perplexity:.2f}"
        )


@torch.no_grad()
def validate(
    model: nn.Module, stream: TokenStream, byte_lengths: NDArray[np.integer], *, block_size: int, batch: int,
    cluster: Cluster, autocast: AbstractContextManager[object], limit: int = 0,
) -> Validation:  # fmt: skip
    """Loss over windows of block_size side by side in the split, or in its first `limit` tokens (0: all).

    Bits per byte is the information of all predicted tokens, ends of text included, over the bytes of text that
    they stand for; unlike the loss it can be compared between tokenizers. Batches are divided among the
    processes and their sums added in float64.
    """
    windows = validation_windows(stream, block_size, limit)
    was_training = model.training
    model.eval()
    sums = np.zeros(3)  # nats, tokens, bytes
    for first in range(0, windows, cluster.world * batch):  # as often on every process: sharded models need that
        inputs, targets = validation_batch(stream, block_size, first + cluster.rank * batch, batch, windows)
        counted = targets[targets >= 0].numpy()
        with autocast:
            _, loss = model(inputs.to(cluster.device), targets.to(cluster.device))
        sums += (float(loss) * len(counted), len(counted), byte_lengths[counted].sum())
    model.train(was_training)
    total, tokens, size = cluster.total(sums.tolist())
    return Validation(total / tokens, total / math.log(2) / max(1.0, size), int(tokens))
