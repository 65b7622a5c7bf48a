"""One process or many: who this process is, and what all of them agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from nib.device import pick_device
from nib.errors import InputError, RunError


@dataclass
class Cluster:
    """The processes of one run. Agreements go over gloo, between CPUs, so that no GPU has to be waited for."""

    rank: int
    world: int
    device: torch.device
    control: Any = None  # the gloo group, where there are several processes

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """The sum over processes of each value, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def from_first(self, value: Any) -> Any:
        """What the first process passes, on all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def stop(self) -> None:
        """Leave together: a process that goes first takes the connections of the others with it."""
        if self.world > 1:
            self.total([0.0])
            dist.destroy_process_group()


def start_cluster(device_name: str) -> Cluster:
    """Join the other processes where torchrun started several: nccl between GPUs, gloo otherwise."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise InputError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}. Start with torchrun") from None
    device = pick_device(device_name, local_rank)
    if world == 1:
        return Cluster(rank, world, device)
    # The longest that one process may wait for another: all do the same work, so that minutes mean one is gone.
    patience = timedelta(minutes=10)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=patience)
        return Cluster(rank, world, device, dist.new_group(backend="gloo", timeout=patience))
    dist.init_process_group("gloo", timeout=patience)
    return Cluster(rank, world, device, dist.group.WORLD)


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turn the body's errors about a process that is gone into a RunError."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        who, reason = os.environ.get("RANK", "0"), str(error).splitlines()[0]
        how = "The same command goes on from the newest checkpoint; torchrun --max-restarts=N does so by itself"
        raise RunError(f"process {who} lost the others: {reason}. {how}") from None


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all processes when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(target: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which all processes hold, sharded as `target` is."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left together of a sharded model."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
