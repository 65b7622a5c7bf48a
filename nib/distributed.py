"""One process or many: who this process is, and what all of them agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nib.device import pick_device
from nib.errors import InputError


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
        if self.world > 1:
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
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
        return Cluster(rank, world, device, dist.new_group(backend="gloo"))
    dist.init_process_group("gloo")
    return Cluster(rank, world, device, dist.group.WORLD)
