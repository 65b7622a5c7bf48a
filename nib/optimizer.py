"""AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Newton-Schulz coefficients tuned for a steep start at zero, so that five steps bring all singular values near 1:
# Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each of `matrices` (K, rows, columns), in float32 or bfloat16.

    Newton-Schulz iteration: singular values end between about 0.7 and 1.2, which trains as well as exactly 1.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT  # (K, rows, rows), the smaller side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then the update replaced by the nearest semi-orthogonal matrix (Jordan 2024).

    The update of a matrix is scaled by sqrt(max(1, rows / columns)), decay is decoupled and multiplied by the
    learning rate. `parts` gives the row counts by which a parameter that holds several matrices one above the
    other (queries, keys and values) is cut before each is orthogonalised by itself. Matrices of the same shape
    are orthogonalised in one batched product.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], parts: dict[nn.Parameter, list[int]], lr: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, dict(lr=lr, momentum=0.95, weight_decay=weight_decay))
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
                sizes = self.parts.get(parameter, [parameter.shape[0]])
                for matrix, weight in zip(update.split(sizes), parameter.split(sizes), strict=True):
                    by_shape.setdefault(matrix.shape, []).append((matrix, weight))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalise(torch.stack([matrix for matrix, _ in pairs]))
                scale = max(1.0, rows / columns) ** 0.5
                for (_, weight), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update.to(weight.dtype), alpha=-group["lr"] * scale)


def make_optimizers(
    model: nn.Module, *, kind: str, learning_rate: float, muon_learning_rate: float, weight_decay: float,
    betas: tuple[float, float], fused: bool = True,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers of `model`, each of whose groups carries its peak rate as `peak_lr`.

    Decay falls on matrices only (two dimensions or more). Under "muon" the matrices inside the blocks go to Muon.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    hidden = [p for name, p in named if kind == "muon" and name.startswith("blocks.") and p.ndim == 2]
    chosen = set(hidden)
    rest = [p for _, p in named if p not in chosen]
    groups = [
        dict(params=[p for p in rest if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0),
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused))
    if hidden:
        optimizers.append(Muon(hidden, joined_matrices(model), muon_learning_rate, weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def joined_matrices(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """Row counts of the matrices that one parameter holds: queries, keys, values; gate and input of swiglu."""
    parts: dict[nn.Parameter, list[int]] = {}
    config: Any = model.config
    for name, parameter in model.named_parameters():
        if name.endswith("attention.qkv.weight"):
            sizes = (config.n_head, config.n_kv_head, config.n_kv_head)
            parts[parameter] = [heads * config.head_size for heads in sizes]
        elif name.endswith("mlp.up.weight") and config.mlp == "swiglu":
            parts[parameter] = [config.mlp_hidden, config.mlp_hidden]
    return parts


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
