"""A sparse feed-forward layer: each token goes to the top k of many small experts (arXiv 1701.06538, 2401.04088).

    python labs/mixture_of_experts.py

Measured: config/tiny.py (200 steps, characters of the standard library), 3 seeds, which differ by 0.040 on average.
Last column: the load of the busiest expert in the last training batch, as a multiple of an even share, for each seed.

                              parameters  bits per byte  - baseline   busiest expert
    dense, 2 x 96                121,152          3.271
    8 experts of 96, 2 chosen    343,360          3.246      -0.025   1.68 1.27 1.29
    the same, not balanced       343,360          3.239      -0.032   2.93 3.64 3.51
    dense, 8 x 96                342,336          3.140      -0.131

Conclusion: the biases spread the tokens over the experts and have no visible cost. At the same compute per token, the
experts' additional parameters do not help yet, while a dense layer that uses all of them for each token does. An expert
sees a quarter of the tokens: in 200 steps it learns from as many as in 50 steps. Sparse layers need longer runs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lab import Variants, main, model

import torch
from torch import Tensor, nn


@dataclasses.dataclass
class GPTConfig(model.GPTConfig):
    experts: int = 0  # of each feed-forward layer, mlp_hidden wide each; 0: one layer for all tokens
    chosen: int = 2  # experts for each token
    balance: float = 1e-2  # change of an expert's bias in a step (the paper: 1e-3, in longer runs); 0: no balancing


class Mixture(nn.Module):
    """Experts, and a router that chooses some for each token; the weights of the chosen ones add up to 1.

    Balancing without an auxiliary loss (arXiv 2408.15664): a bias is added to each expert's score for choosing, not for
    weighting. After each forward pass the biases of experts with more than an even share of the tokens are lowered, and
    those of the others raised. activation_checkpointing does not work: it recomputes the layer with the changed biases,
    and torch raises an error.
    """

    counts: Tensor
    bias: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.chosen, self.balance = config.chosen, config.balance
        self.router = nn.Linear(config.n_embd, config.experts, bias=False)
        self.experts = nn.ModuleList(model.MLP(config) for _ in range(config.experts))
        self.register_buffer("bias", torch.zeros(config.experts))
        self.register_buffer("counts", torch.zeros(config.experts))  # tokens of the last batch of training

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
        if self.training:
            self.counts.copy_(torch.bincount(chosen.flatten(), minlength=len(self.experts)))
            self.bias += self.balance * (self.counts.mean() - self.counts).sign()
        return y.view_as(x)


class Block(model.Block):
    """model.Block with a mixture of experts as its feed-forward layer."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        if config.experts:
            self.mlp = Mixture(config)  # type: ignore[assignment]


class GPT(model.GPT):
    @torch.no_grad()
    def initialise(self) -> None:
        """As in model.GPT; with init=modern the experts' output matrices start at zero too."""
        super().initialise()
        for name, parameter in self.named_parameters():
            if ".experts." in name and name.endswith("down.weight") and self.config.init == "modern":
                parameter.zero_()


def busiest(trained: Any) -> str:
    """The load of the busiest expert of any layer in the last training batch, as a multiple of an even share."""
    loads = [each.counts.max() / each.counts.mean() for each in trained.modules() if isinstance(each, Mixture)]
    return f"{max(loads):.2f}" if loads else "-"


VARIANTS: Variants = {
    "dense, 2 x 96": dict(mlp_hidden=192),
    "8 experts of 96, 2 chosen": dict(mlp_hidden=96, experts=8),
    "the same, not balanced": dict(mlp_hidden=96, experts=8, balance=0.0),
    "dense, 8 x 96": dict(mlp_hidden=768),
}
MEASURES = {"busiest expert": busiest}

if __name__ == "__main__":
    main(__doc__ or "", __file__, VARIANTS, MEASURES, Block=Block, GPT=GPT, GPTConfig=GPTConfig)
