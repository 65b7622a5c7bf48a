"""AdamW for everything, or Muon for the matrices of the blocks and AdamW for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nib.common.device import pick_dtype
from nib.formats.adapter import adapted_layers
from nib.training.distributed import like, whole
from nib.training.lora import MARK

# Newton-Schulz coefficients with a large slope at zero, so that five steps bring all singular values near 1:
# Keller Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
# Muon updates at least so many elements together (64 MB); on a GPU four times as many, since small matmuls leave it
# mostly idle.
ENOUGH = 2**24
# From this many rows on, single matmuls are faster on a CPU than MKL's batched ones, on one or two threads
# (bench/NOTES.md).
SINGLE_ROWS = 128


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """Approximately the nearest semi-orthogonal matrix to each of `matrices` (K, rows, columns); matmuls in `dtype`.

    Newton-Schulz iteration: singular values end between about 0.7 and 1.2, which trains as well as exactly 1.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.to(dtype)  # after normalising: gradients may be too small for float16
    if x.device.type == "cpu" and dtype == torch.float32 and x.shape[-2] >= SINGLE_ROWS:
        x = torch.stack([orthogonalise_one(each, steps) for each in x])
    else:
        for _ in range(steps):
            gram = x @ x.mT  # (K, rows, rows), the smaller side
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def orthogonalise_one(x: Tensor, steps: int) -> Tensor:
    """The same iteration for one x (rows <= columns) of norm 1, with single matmuls, for which oneDNN is used.

    Every step multiplies x by a polynomial P of its Gram matrix G, which becomes P G P. So if x is wide, the small
    square matrices P are multiplied first, and then with x: 17 rows^3 + 2 rows^2 columns multiplications in five steps,
    instead of 5 rows^3 + 10 rows^2 columns. Squaring x loses precision, too much for bfloat16.
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
    """An optimizer that does not import torch's compiler, which takes about as long as importing torch itself.

    torch decorates these methods so that they are not compiled, and imports the compiler when one is first called.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(UncompiledOptimizer, torch.optim.AdamW):
    """torch.optim.AdamW (arXiv 1711.05101). Its state is allocated by the constructor, so that a trial counts it."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        for parameter in (each for group in self.param_groups for each in group["params"]):
            step = torch.zeros((), device=parameter.device)
            averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.state[parameter] = {"step": step} | averages

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(UncompiledOptimizer):
    """Momentum, then the update replaced by the nearest semi-orthogonal matrix (Jordan 2024).

    The update of a matrix is scaled by sqrt(max(1, rows / columns)). Weight decay is decoupled and multiplied by the
    learning rate. `parts` gives the row counts of parameters that hold several concatenated matrices (queries, keys and
    values), each of which is orthogonalised separately, by matmuls in `dtype`. With several processes each
    orthogonalises its share, and they exchange the results; parameters sharded by FSDP are gathered for that, a few at
    a time. As in torch's fused optimizers, a tensor `found_inf` of 1 makes a step change nothing, without
    synchronisation.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, parameters: Iterable[nn.Parameter], parts: dict[nn.Parameter, list[int]], lr: float, weight_decay: float,
        momentum: float = 0.95, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.parts, self.dtype = parts, dtype
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameters in portions(group["params"]):
                self._update(parameters, group)

    def _update(self, parameters: Any, group: dict[str, Any]) -> None:
        """Update with operations on lists of tensors, which take few kernels on a GPU."""
        buffers, skip = [self.state[parameter]["momentum_buffer"] for parameter in parameters], self.found_inf
        updates: Any = [parameter.grad for parameter in parameters]
        if skip is not None:  # select, since 0 times NaN would be NaN
            stays = skip > 0
            updates = [torch.where(stays, *each) for each in zip(buffers, updates, strict=True)]
        torch._foreach_lerp_(buffers, updates, 1 - group["momentum"])
        torch._foreach_lerp_(updates, buffers, group["momentum"])  # Nesterov, in the place of the gradients
        pairs = zip(parameters, updates, strict=True)
        matrices = [each for p, update in pairs for each in self.split(p, whole(update))]
        matrices = shared_orthogonalise(matrices, self.dtype)
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
    """The parameters with a gradient, in portions just large enough to give every process work.

    Not all at once: while a portion is updated, two more copies of its matrices are in memory, and sharded ones are
    gathered.
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


def orthogonalise_all(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`orthogonalise` for matrices of any shapes, batched by shape; the results have the dtype of the matrices."""
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    done = list(matrices)
    for alike in by_shape.values():
        found = orthogonalise(torch.stack([matrices[i] for i in alike]), dtype).to(matrices[0].dtype).contiguous()
        for i, result in zip(alike, found, strict=True):
            done[i] = result
    return done


def shared_orthogonalise(matrices: list[Tensor], products: torch.dtype = torch.float32) -> list[Tensor]:
    """`orthogonalise_all` for matrices that all processes hold: each computes its share and sends it to the others."""
    world = processes()
    if world == 1:
        return orthogonalise_all(matrices, products)
    by_size = sorted(range(len(matrices)), key=lambda i: matrices[i].numel())
    shares = [by_size[rank::world] for rank in range(world)]
    lengths = [[matrices[i].numel() for i in share] for share in shares]
    mine = orthogonalise_all([matrices[i] for i in shares[dist.get_rank()]], products)
    dtype, device = matrices[0].dtype, matrices[0].device
    sent = torch.zeros(max(map(sum, lengths)), device=device, dtype=products)
    if mine:
        torch.cat([matrix.flatten() for matrix in mine], out=sent[: sum(matrix.numel() for matrix in mine)])
    everyone = [torch.empty_like(sent) for _ in range(world)]
    dist.all_gather(everyone, sent)  # one exchange only, since each waits for the slowest process
    done = list(matrices)
    for share, sizes, results in zip(shares, lengths, everyone, strict=True):
        for i, result in zip(share, results[: sum(sizes)].to(dtype).split(sizes), strict=True):
            done[i] = result.view(matrices[i].shape)
    return done


def make_optimizers(
    model: nn.Module, *, kind: str, learning_rate: float, muon_learning_rate: float, weight_decay: float,
    betas: tuple[float, float], muon_momentum: float = 0.95, fused: bool = True, dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """The optimizers of `model`; each parameter group has its peak learning rate as `peak_lr`.

    Weight decay applies only to matrices (two dimensions or more). With "muon", Muon updates the matrices in the
    blocks, except those of an adapter: there the product B A would have to be orthogonalised, and it starts at 0.
    Muon's matmuls are in 16 bits on a GPU, and on a CPU if `dtype` is bfloat16.
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
        bfloat16 = hidden[0].device.type == "cpu" and dtype == torch.bfloat16
        products = dtype if bfloat16 else pick_dtype("auto", hidden[0].device)
        parts = stacked_matrices(model)
        optimizers.append(Muon(hidden, parts, muon_learning_rate, weight_decay, muon_momentum, products))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def stacked_matrices(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """The row counts of parameters that hold several matrices: queries, keys and values; gate and up of swiglu."""
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    layers = adapted_layers(shapes, vars(model.config))
    return {parameters[f"{layer}.weight"]: [*rows.values()] for layer, rows in layers.items() if len(rows) > 1}


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
