"""LayerNorm, RMSNorm, none, BatchNorm: which one leaks later tokens, and which one fails on a single token?

    python labs/normalisation.py

Measured: config/tiny.py (200 steps, characters of the standard library), 3 seeds, which differ by 0.040 on average.
Leak: how much the logits at the first token change if the last token of a text changes, for each seed. One token:
whether a text of one token works. Both are in training mode.

                bits per byte  - baseline   leak, %       one token
    rmsnorm             3.257               0.0           works
    layernorm           3.275      +0.018   0.0           works
    none                4.013      +0.756   0.0           works
    batchnorm           3.698      +0.441   3.6 5.4 51.5  fails

Conclusion: a norm is needed; the difference between RMSNorm and LayerNorm is within the noise. BatchNorm takes means
over all positions, so each hidden state depends on later tokens. In these few steps the model gained nothing from
that: its loss is 0.3 nats above RMSNorm's both in training, where it leaks, and in validation, which uses running
means. Only with running means can it generate: in training mode a single token has no variance to divide by.
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
    norm_kind: Literal["as norm says", "none", "batch"] = "as norm says"  # replaces every norm


class BatchNorm(nn.BatchNorm1d):
    """Normalises each channel over all texts and positions of the batch (arXiv 1502.03167)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x)


def make_any_norm(size: int, config: Any) -> nn.Module:
    if config.norm_kind == "batch":
        return BatchNorm(size, eps=config.norm_eps)
    return nn.Identity() if config.norm_kind == "none" else make_norm(size, config)


def leak(trained: Any) -> float:
    """The relative change of the logits at the first token if only the last token changes, in training mode."""
    trained.train()
    tokens = torch.arange(16)[None] % trained.config.vocab_size
    other = tokens.clone()
    other[0, -1] += 1
    with torch.no_grad():
        before, after = (trained(each)[0][0, 0] for each in (tokens, other))
    return float((after - before).norm() / before.norm())


def one_token(trained: Any) -> str:
    """Whether a text of one token works in training mode, as in generating one token at a time."""
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
