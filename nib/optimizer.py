"""AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nib.distributed import like, whole

# Newton-Schulz coefficients tuned for a steep start at zero, so that five steps bring all singular values near 1:
# Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


# From this many rows on, a CPU is faster with one product after the other than with MKL's batched ones.
SINGLE_ROWS = 96


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each of `matrices` (K, rows, columns), in float32 or bfloat16.

    Newton-Schulz iteration: singular values end between about 0.7 and 1.2, which trains as well as exactly 1.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    if x.device.type == "cpu" and x.shape[-2] >= SINGLE_ROWS:
        x = torch.stack([orthogonalise_one(each, steps) for each in x])
    else:
        for _ in range(steps):
            gram = x @ x.mT  # (K, rows, rows), the smaller side
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalise_one(x: Tensor, steps: int) -> Tensor:
    """The same iteration of one x (rows <= columns) of norm 1, by products of two matrices, which go to oneDNN.

    Every step multiplies x by a polynomial P of its Gram matrix G, which thereby becomes P G P. So where x is wide,
    all P are multiplied first, small and square, and then with x: 17 rows^3 + 2 rows^2 columns multiplications in
    five steps, against 5 rows^3 + 10 rows^2 columns. Squaring x costs digits, too many for bfloat16.
    """
    a, b, c = NEWTON_SCHULZ
    rows, columns = x.shape
    wide = columns >= 2 * rows
    gram, product = x @ x.mT, None
    for step in range(steps):
        p = torch.add(b * gram, gram @ gram, alpha=c)
        p.diagonal().add_(a)
        if wide:
            product = p if product is None else p @ product
        else:
            x = p @ x
        if step < steps - 1:
            gram = p @ gram @ p if wide else x @ x.mT
    return x if product is None else product @ x


class Muon(torch.optim.Optimizer):
    """Momentum, then the update replaced by the nearest semi-orthogonal matrix (Jordan 2024).

    The update of a matrix is scaled by sqrt(max(1, rows / columns)), decay is decoupled and multiplied by the
    learning rate. `parts` gives the row counts by which a parameter that holds several matrices one above the
    other (queries, keys and values) is cut before each is orthogonalised by itself. With several processes each
    orthogonalises its share of the matrices of one shape and they exchange the results; parameters sharded by FSDP
    are put together for that, a few at a time.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], parts: dict[nn.Parameter, list[int]], lr: float, weight_decay: float,
        momentum: float = 0.95,
    ) -> None:  # fmt: skip
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_parts: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    sizes = self.parts.get(parameter, [parameter.shape[0]])
                    by_parts.setdefault((parameter.shape[1], *sizes), []).append(parameter)
            for alike in by_parts.values():
                # Sharded parameters are whole only here, so that no more of them than processes are at a time.
                several = dist.get_world_size() if isinstance(alike[0], DTensor) else len(alike)
                for begin in range(0, len(alike), several):
                    self._update(alike[begin : begin + several], group)

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Update parameters of one shape and the same parts."""
        sizes = self.parts.get(parameters[0], [parameters[0].shape[0]])
        by_size: dict[int, list[Tensor]] = {}
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer, grad = state["momentum_buffer"], parameter.grad
            assert grad is not None
            buffer.lerp_(grad, 1 - group["momentum"])
            update = whole(grad.lerp(buffer, group["momentum"]))  # Nesterov
            for size, matrix in zip(sizes, update.split(sizes), strict=True):
                by_size.setdefault(size, []).append(matrix)
        done = {size: iter(shared_orthogonalise(torch.stack(matrices))) for size, matrices in by_size.items()}
        for parameter in parameters:
            columns = parameter.shape[1]
            scaled = [next(done[size]) * max(1.0, size / columns) ** 0.5 for size in sizes]
            update = torch.cat(scaled).to(parameter.dtype) if len(scaled) > 1 else scaled[0].to(parameter.dtype)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(like(parameter, update), alpha=-group["lr"])


def shared_orthogonalise(matrices: Tensor) -> Tensor:
    """`orthogonalise` of (K, rows, columns), which all processes hold, each doing its share of the work."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return orthogonalise(matrices)
    share = -(-len(matrices) // world)
    begin = dist.get_rank() * share
    mine = torch.zeros(share, *matrices.shape[1:], device=matrices.device, dtype=matrices.dtype)
    own = matrices[begin : begin + share]
    if len(own):
        mine[: len(own)] = orthogonalise(own)
    everyone = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone)[: len(matrices)]


def make_optimizers(
    model: nn.Module, *, kind: str, learning_rate: float, muon_learning_rate: float, weight_decay: float,
    betas: tuple[float, float], muon_momentum: float = 0.95, fused: bool = True,
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
        optimizers.append(Muon(hidden, joined_matrices(model), muon_learning_rate, weight_decay, muon_momentum))
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
