"""LayerNorm, RMSNorm, none, BatchNorm: what leaks from the future, and what breaks one token at a time?

    python labs/normalisation.py

Measured: config/tiny.py (200 steps, characters of the standard library), 3 seeds, 0.040 apart on average. Also: how far
changing the last token of a text moves the logits at its first one, for each seed, and whether a text of one token
works, both in training mode.

                bits per byte  - baseline   leak, %       one token
    rmsnorm             3.257               0.0           works
    layernorm           3.275      +0.018   0.0           works
    none                4.013      +0.756   0.0           works
    batchnorm           3.698      +0.441   3.6 5.4 51.5  fails

Conclusion: a norm is needed; the difference of RMSNorm and LayerNorm is within the noise. BatchNorm's means are over
all positions, so that the state of each token depends on later tokens. In these few steps the model gained nothing by
that: its loss is 0.3 nats above RMSNorm's in training, where it leaks, and in validation, where running means are
used. Only with those can it write: a single token at a time, as in training, has no variance to divide by.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lab import Variants, main, model

import torch
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
    except ValueError:  # "Expected more than 1 value per channel when training"
        return "fails"
    return "works"


COMMON = ("--no-qk_norm",)
VARIANTS: Variants = {
    "rmsnorm": dict(norm="rmsnorm"),
    "layernorm": dict(norm="layernorm"),
    "none": dict(norm_kind="none"),
    "batchnorm": dict(norm_kind="batch"),
}
MEASURES = {"leak, %": lambda trained: f"{100 * leak(trained):.1f}", "one token": one_token}

if __name__ == "__main__":
    main(__doc__ or "", __file__, VARIANTS, MEASURES, COMMON, make_norm=make_any_norm, GPTConfig=GPTConfig)
