"""A sparse feed-forward layer: each token goes to the best k of many small experts (arXiv 1701.06538, 2401.04088).

    python labs/mixture_of_experts.py

TABLE
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from lab import Variants, main, model
from torch import Tensor, nn


@dataclasses.dataclass
class GPTConfig(model.GPTConfig):
    experts: int = 0  # of each feed-forward layer, mlp_hidden wide each; 0: one layer for all tokens
    chosen: int = 2  # experts that a token goes to
    balance: float = 1e-3  # by which an expert's bias moves in a step; 0: the router is left to itself


class Mixture(nn.Module):
    """Experts, of which a router chooses for each token; the weights of the chosen add up to 1.

    Balance without an auxiliary loss (arXiv 2408.15664): a bias is added to each expert's score where the best are
    chosen, not where they are weighted. After a batch the biases of experts with more than their share fall.
    """

    counts: Tensor
    bias: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.chosen, self.balance = config.chosen, config.balance
        self.router = nn.Linear(config.n_embd, config.experts, bias=False)
        self.experts = nn.ModuleList(model.MLP(config) for _ in range(config.experts))
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("counts", torch.zeros(config.experts), persistent=False)  # tokens of the last batch

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, C)
        scores = self.router(rows).softmax(-1, dtype=torch.float32)  # (N, experts)
        chosen = (scores + self.bias).topk(self.chosen).indices  # (N, k)
        weights = scores.gather(1, chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, row, expert(rows[row]) * weights[row, place, None])
        self.counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).float()
        if self.training and self.balance:
            self.bias += self.balance * (self.counts.mean() - self.counts).sign()
        return y.view_as(x)


class Block(model.Block):
    """model.Block with a mixture in the place of its feed-forward layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        if config.experts:
            self.mlp = Mixture(config)  # type: ignore[assignment]


class GPT(model.GPT):
    @torch.no_grad()
    def initialise(self) -> None:
        """As model.GPT does it; experts too begin by adding nothing."""
        super().initialise()
        for name, parameter in self.named_parameters():
            if ".experts." in name and name.endswith("down.weight") and self.config.init == "modern":
                parameter.zero_()


def notes(trained: Any) -> str:
    """How unevenly the experts are used on random windows of the training's length: 1 is even."""
    mixtures = [each for each in trained.modules() if isinstance(each, Mixture)]
    if not mixtures:
        return ""
    trained.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        trained(torch.randint(trained.config.vocab_size, (32, trained.config.block_size), generator=generator))
    loads = [float(each.counts.max() / each.counts.mean()) for each in mixtures]
    return f"the busiest expert has {max(loads):.2f} of an even share"


VARIANTS: Variants = {
    "dense, 2 x 96": dict(mlp_hidden=192),
    "8 experts of 96, 2 chosen": dict(mlp_hidden=96, experts=8),
    "the same, not balanced": dict(mlp_hidden=96, experts=8, balance=0.0),
    "dense, 8 x 96": dict(mlp_hidden=768),
}

if __name__ == "__main__":
    main(__doc__ or "", __file__, VARIANTS, notes, Block=Block, GPT=GPT, GPTConfig=GPTConfig)
