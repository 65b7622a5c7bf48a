"""LayerNorm, RMSNorm, none, BatchNorm: what leaks from the future, and what breaks one token at a time?

    python labs/normalisation.py

TABLE
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from lab import Variants, main, model
from torch import Tensor, nn

make_norm = model.make_norm


@dataclasses.dataclass
class GPTConfig(model.GPTConfig):
    norm_kind: Literal["as norm says", "none", "batch"] = "as norm says"  # in the place of every norm


class BatchNorm(nn.BatchNorm1d):
    """Each channel by its mean and variance over all texts and positions of the batch (arXiv 1502.03167)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def make_any_norm(size: int, config: Any) -> nn.Module:
    if config.norm_kind == "batch":
        return BatchNorm(size, eps=config.norm_eps)
    return nn.Identity() if config.norm_kind == "none" else make_norm(size, config)


def leak(trained: Any) -> float:
    """How far the logits at the first token move, of their size, when only the last token changes, as in training."""
    trained.train()
    tokens = torch.arange(16)[None] % trained.config.vocab_size
    other = tokens.clone()
    other[0, -1] += 1
    with torch.no_grad():
        before, after = (trained(each)[0][0, 0] for each in (tokens, other))
    return float((after - before).norm() / before.norm())


def one_token(trained: Any) -> str:
    """What happens in training mode, where a text is one token, as when one is generated at a time."""
    try:
        trained.train()(torch.zeros(1, 1, dtype=torch.int64))
    except ValueError as error:
        return f"one token: {error}"
    return "one token works"


def notes(trained: Any) -> str:
    return f"the last token moves the first one's logits by {100 * leak(trained):.3f} %; {one_token(trained)}"


COMMON: dict[str, Any] = dict(qk_norm=False)
VARIANTS: Variants = {
    "rmsnorm": COMMON | dict(norm="rmsnorm"),
    "layernorm": COMMON | dict(norm="layernorm"),
    "none": COMMON | dict(norm_kind="none"),
    "batchnorm": COMMON | dict(norm_kind="batch"),
}

if __name__ == "__main__":
    main(__file__, VARIANTS, notes, make_norm=make_any_norm, GPTConfig=GPTConfig)
