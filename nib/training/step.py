"""One optimizer step: forward and backward passes over a global batch, and the update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nib.training.distributed import is_sharded, whole

if TYPE_CHECKING:
    from nib.data.sequences import Batch, PairBatch
    from nib.training.run import Run


def optimizer_step(run: Run, batch: Sequence[Batch | PairBatch]) -> tuple[Tensor, Tensor]:
    """One update from this process's share of the global batch, in micro-batches.

    Returns the loss, the mean over all targets that are not -1 (nats) or all pairs of the global batch, and the norm
    of its gradient before clipping to grad_clip. If either is not finite, no optimizer updates anything, and float16's
    loss scale falls. Without any target, loss and gradient are 0, and the update is made. Random numbers are seeded by
    (seed, step, process, micro-batch), so that a resumed run draws the same ones. With run.queued nothing here
    synchronises with the device, where both results stay.
    """
    model, cluster, scaler, settings = run.ready, run.cluster, run.precision.scaler, run.settings
    objective: Any = run.objective
    (counted,) = cluster.total([sum(map(objective.weight, batch))])
    total = torch.zeros((), device=cluster.device)
    for index, part in enumerate(run.precision.casting_once(batch)):
        torch.manual_seed(seed_for(settings.seed, run.progress.step, cluster.rank, index))
        # Gradients are averaged over the processes, only in the last backward pass of a step.
        with exchanging(model, index == len(batch) - 1):
            with run.precision.training(masked=has_window(run.model)):
                loss = objective.loss(run, part)
            share = loss * (objective.weight(part) / max(1.0, counted))
            scaler.scale(share * cluster.world).backward()
        total += share.detach()
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf))
    found = torch.stack((total, norm)).to(cluster.device if run.queued else "cpu").double()
    numbers = torch.stack((found[0], (~found[1].isfinite()).double()))
    loss_sum, unfit, *sums = cluster.total_on_device(torch.cat((numbers, objective.take().to(numbers))))
    run.measured = objective.measured(sums, counted)
    grad_norm = found[1] + torch.where(unfit > 0, math.inf, 0.0)  # the same decision on all processes
    skip = ~(loss_sum + grad_norm).isfinite()  # scaler.step would decide for each optimizer by its own gradients
    for optimizer in run.optimizers:
        if run.queued:
            optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        if run.queued or not skip:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss_sum, grad_norm


def has_window(model: Any) -> bool:
    return getattr(model.config, "window", 0) > 0  # a user may have removed the option


def exchanging(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Exchange gradients in the body's backward pass only if it is the last one of a step."""
    if is_sharded(model):
        model.set_requires_gradient_sync(last)  # type: ignore[operator]
    elif hasattr(model, "no_sync") and not last:  # DDP, perhaps compiled
        return model.no_sync()  # type: ignore[operator]
    return nullcontext()


def seed_for(*parts: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")
