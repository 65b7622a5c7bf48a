"""AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nib.common.device import pick_dtype
from nib.training.distributed import like, whole
from nib.training.lora import MARK

# Newton-Schulz coefficients tuned for a steep start at zero, so that five steps bring all singular values near 1:
# Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


# So many elements at least are updated together by Muon: 64 MB; four times as many where a small product leaves most
# of a GPU idle.
ENOUGH = 2**24

# From this many rows on, a CPU is faster with one product after the other than with MKL's batched ones, on one
# thread or two (bench/NOTES.md).
SINGLE_ROWS = 128


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly, of each of `matrices` (K, rows, columns); a GPU takes 16 bits.

    Newton-Schulz iteration: singular values end between about 0.7 and 1.2, which trains as well as exactly 1.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(pick_dtype("auto", x.device))  # not before: gradients may be too small for float16
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


class UncompiledOptimizer(torch.optim.Optimizer):
    """An optimizer that does without torch's compiler, whose import takes about as long as that of torch itself.

    torch marks these methods as not to be compiled, and loads the compiler for that when one of them is first called.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(UncompiledOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW (arXiv 1711.05101)."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(UncompiledOptimizer):
    """Momentum, then the update replaced by the nearest semi-orthogonal matrix (Jordan 2024).

    The update of a matrix is scaled by sqrt(max(1, rows / columns)), decay is decoupled and multiplied by the
    learning rate. `parts` gives the row counts by which a parameter that holds several matrices one above the
    other (queries, keys and values) is cut before each is orthogonalised by itself. With several processes each
    orthogonalises its share of them and they exchange the results; parameters sharded by FSDP are put together for
    that, a few at a time. As with torch's fused optimizers, a tensor `found_inf` of 1 makes a step change nothing
    without a wait for the device.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, parameters: Iterable[nn.Parameter], parts: dict[nn.Parameter, list[int]], lr: float, weight_decay: float,
        momentum: float = 0.95,
    ) -> None:  # fmt: skip
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts = parts

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameters in portions(group["params"]):
                self._update(parameters, group)

    def _update(self, parameters: Any, group: dict[str, Any]) -> None:
        """Operations on lists, each of which a GPU does in few kernels."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers, skip = [self.state[parameter]["momentum_buffer"] for parameter in parameters], self.found_inf
        updates: Any = [parameter.grad for parameter in parameters]
        if skip is not None:  # then NaN, which no factor makes 0, goes nowhere
            stays = skip > 0
            updates = [torch.where(stays, *each) for each in zip(buffers, updates, strict=True)]
        torch._foreach_lerp_(buffers, updates, 1 - group["momentum"])
        torch._foreach_lerp_(updates, buffers, group["momentum"])  # Nesterov, in the place of the gradients
        pairs = zip(parameters, updates, strict=True)
        matrices = shared_orthogonalise([each for p, update in pairs for each in self.split(p, whole(update))])
        torch._foreach_mul_(matrices, [max(1.0, each.shape[0] / each.shape[1]) ** 0.5 for each in matrices])
        decay: Any = 1 - group["lr"] * group["weight_decay"]
        if skip is not None:
            torch._foreach_mul_(matrices, 1 - skip)
            decay = torch.where(stays, 1.0, decay)
        done = iter(matrices)
        parts = [[next(done) for _ in self.split(p, p)] for p in parameters]
        pairs = zip(parameters, parts, strict=True)
        updates = [like(p, torch.cat(each) if len(each) > 1 else each[0]) for p, each in pairs]
        torch._foreach_mul_(parameters, decay)
        torch._foreach_add_(parameters, updates, alpha=-group["lr"])

    def split(self, parameter: nn.Parameter, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.parts.get(parameter, [parameter.shape[0]]))


def portions(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Those with a gradient, cut into runs just long enough to give every process work.

    Not all at once: while a run is updated its matrices are in memory twice more, and sharded ones whole.
    """
    portion: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.grad is not None:
            portion.append(parameter)
        enough = ENOUGH if parameter.device.type == "cpu" else 4 * ENOUGH
        if len(portion) >= processes() and sum(each.numel() for each in portion) >= enough:
            yield portion
            portion = []
    if portion:
        yield portion


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalise` of matrices of any shapes, those of the same shape together; in the dtype of the matrices."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    done = list(matrices)
    for alike in by_shape.values():
        found = orthogonalise(torch.stack([matrices[i] for i in alike])).to(matrices[0].dtype).contiguous()
        for i, result in zip(alike, found, strict=True):
            done[i] = result
    return done


def shared_orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalise_all` of what all processes hold, each doing its share of the work and sending it to the others."""
    world = processes()
    if world == 1:
        return orthogonalise_all(matrices)
    by_size = sorted(range(len(matrices)), key=lambda i: matrices[i].numel())
    shares = [by_size[rank::world] for rank in range(world)]
    lengths = [[matrices[i].numel() for i in share] for share in shares]
    mine = orthogonalise_all([matrices[i] for i in shares[dist.get_rank()]])
    dtype, device = matrices[0].dtype, matrices[0].device
    sent = torch.zeros(max(map(sum, lengths)), device=device, dtype=pick_dtype("auto", device))  # orthogonalise's
    if mine:
        torch.cat([matrix.flatten() for matrix in mine], out=sent[: sum(matrix.numel() for matrix in mine)])
    everyone = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(everyone, sent)  # one exchange: each costs a wait for the slowest process
    done = list(matrices)
    for share, sizes, results in zip(shares, lengths, everyone, strict=True):
        for i, result in zip(share, results[: sum(sizes)].to(dtype).split(sizes), strict=True):
            done[i] = result.view(matrices[i].shape)
    return done


def make_optimizers(
    model: nn.Module, *, kind: str, learning_rate: float, muon_learning_rate: float, weight_decay: float,
    betas: tuple[float, float], muon_momentum: float = 0.95, fused: bool = True,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers of `model`, each of whose groups carries its peak rate as `peak_lr`.

    Decay falls on matrices only (two dimensions or more). Under "muon" the matrices inside the blocks go to Muon, but
    never those of an adapter: B A is what would have to be orthogonal, and starts from 0.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = [(name, p) for name, p in named if name.startswith("blocks.") and MARK not in name]
    hidden = [p for _, p in blocks if kind == "muon" and p.ndim == 2]
    chosen = set(hidden)
    rest = [p for _, p in named if p not in chosen]
    groups = [
        dict(params=[p for p in rest if p.ndim >= 2], weight_decay=weight_decay),
        dict(params=[p for p in rest if p.ndim < 2], weight_decay=0.0),
    ]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(AdamW(groups, lr=learning_rate, betas=betas, fused=fused))
    if hidden:
        optimizers.append(Muon(hidden, stacked_matrices(model), muon_learning_rate, weight_decay, muon_momentum))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def stacked_matrices(model: nn.Module) -> dict[nn.Parameter, list[int]]:
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
