"""Validation: one full, deterministic pass that draws no random numbers and changes nothing."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nib.data.sequences import ValidationSequences
from nib.training.distributed import Cluster


@dataclass
class Validation:
    """The result of a pass over a split. `loss` is in nats per token."""

    loss: float
    bits_per_byte: float
    tokens: int
    parts: dict[str, Validation] = field(default_factory=dict)  # for a mixture, by dataset

    def metrics(self) -> dict[str, float]:
        found = {"val_loss": self.loss, "val_bits_per_byte": self.bits_per_byte}
        return found | {f"val_loss/{name}": part.loss for name, part in self.parts.items()}

    def __str__(self) -> str:
        bits = f"{self.bits_per_byte:.4f} bits per byte"
        perplexity = math.exp(min(self.loss, 700.0))
        of = "".join(f"; {name} {part.loss:.4f}" for name, part in self.parts.items())
        return f"validation loss {self.loss:.4f}, {bits}, perplexity {perplexity:.2f}{of}"


@torch.no_grad()
def validate(
    model: nn.Module, sequences: ValidationSequences, byte_lengths: NDArray[np.integer], *, batch: int,
    cluster: Cluster, autocast: AbstractContextManager[object],
) -> Validation:  # fmt: skip
    """The loss over all targets that are not -1.

    Bits per byte is the information of all predicted tokens, including end-of-text, divided by the bytes of text that
    they stand for. Unlike the loss it can be compared between tokenizers. Batches are divided among the processes, and
    their sums are added in float64.
    """
    was_training = model.training
    model.eval()
    sums = np.zeros(3)  # nats, tokens, bytes
    # The same number of passes on every process, as sharded models need.
    for first in range(0, sequences.size, cluster.world * batch):
        inputs, targets = sequences.batch(first + cluster.rank * batch, batch)
        counted = targets[targets >= 0].numpy()
        with autocast:
            _, loss = model(inputs.to(cluster.device), targets.to(cluster.device))
        sums += (float(loss) * len(counted), len(counted), byte_lengths[counted].sum())
    model.train(was_training)
    total, tokens, size = cluster.total(sums.tolist())
    return Validation(total / tokens, total / math.log(2) / max(1.0, size), int(tokens))


def mean_of(found: list[tuple[str, float, Validation]]) -> Validation:
    """The mean of the validations of several datasets (name, share, validation); a single one is returned as it is."""
    if len(found) == 1:
        return found[0][2]
    total = sum(share for _, share, _ in found)
    loss = sum(share * part.loss for _, share, part in found) / total
    bits_per_byte = sum(share * part.bits_per_byte for _, share, part in found) / total
    return Validation(loss, bits_per_byte, sum(part.tokens for *_, part in found), {name: p for name, _, p in found})
