"""One process or many: who this process is, and what all of them agree on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nib.common.device import pick_device
from nib.common.exits import InputError, RunError
from nib.common.signals import STOP_SIGNALS

# The longest that one process may wait for another: all do the same work, so that minutes mean one is gone.
PATIENCE = timedelta(minutes=10)
SILENCE = 20.0  # seconds of waiting after which it is said what for


@dataclass
class Cluster:
    """The processes of one run. They agree over gloo on what their CPUs know, so that no GPU has to be waited for."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """The sum over processes of each value, in float64."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def total_on_device(self, tensor: Tensor) -> Tensor:
        """The sum over processes of each element of a tensor on the device, which nobody waits for."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: Any) -> Any:
        """What the first process passes, on all of them."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, seconds: float, signal_number: int) -> tuple[float, int]:
        """The first process's clock, and a signal that any process was sent: all take the same decisions by them."""
        if self.world == 1:
            return seconds, signal_number
        sent = [signal_number == each for each in STOP_SIGNALS]
        clock, *counts = self.total([seconds if self.first else 0.0, *map(float, sent)])
        return clock, next((each for each, count in zip(STOP_SIGNALS, counts, strict=True) if count), 0)

    def stop(self) -> None:
        """Leave together: a process that goes first takes its connections with it."""
        self.total([0.0])


class Place(NamedTuple):
    rank: int
    world: int
    local_rank: int


def own_place() -> Place:
    """Which of how many processes this one is, by torchrun's environment. Raises InputError.

    The only one is the first, whatever RANK a notebook or an earlier job has left in the environment.
    """
    try:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        place = Place(int(os.environ.get("RANK", "0")), world, int(os.environ.get("LOCAL_RANK", "0")))
    except ValueError as error:
        raise InputError(f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers: {error}. Start with torchrun") from None
    if world == 1:
        return Place(0, 1, 0)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not 0 <= place.rank < world:
        what = f"{' and '.join(missing)} missing" if missing else f"RANK {place.rank}"
        raise InputError(f"WORLD_SIZE is {world}, with {what}. Start with torchrun, or unset RANK and WORLD_SIZE")
    return place


def start_cluster(device_name: str) -> Cluster:
    """Join the other processes where torchrun started several: nccl between GPUs, gloo otherwise."""
    rank, world, local_rank = own_place()
    device = pick_device(device_name, local_rank)
    if world == 1:
        return Cluster(rank, world, device)
    connect("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        gpus: list[Any] = [None] * world
        dist.all_gather_object(gpus, str(torch.cuda.get_device_properties(device).uuid))
        refuse_shared_gpus(gpus)
    return Cluster(rank, world, device)


def refuse_shared_gpus(gpus: list[str]) -> None:
    """Raise InputError where two processes have the same of `gpus`, the unique id of each process's: nccl cannot."""
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            who = f"processes {gpus.index(gpu)} and {rank} share one GPU"
            raise InputError(f"{who}. Start one process a GPU, or give each its own by CUDA_VISIBLE_DEVICES")


def connect(backend: str) -> None:
    """Make the process group. Raises RuntimeError when the processes cannot reach each other.

    Every step has the whole of PATIENCE: connecting asks for the names of addresses, and where no name server answers,
    one process may wait 10 seconds for each while the others have long been ready.
    """
    at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} for up to {PATIENCE}"
    waiting = threading.Timer(SILENCE, print, [f"waiting for the other processes at {at}"], {"file": sys.stderr})
    waiting.daemon = True
    waiting.start()
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=PATIENCE))
        store = common_names(store, rank, world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
        dist.all_reduce(torch.zeros(1))
    finally:
        waiting.cancel()


def common_names(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The store under a prefix that these `world` processes have agreed on and no earlier ones had.

    After a restart torchrun hands out the same store, with the addresses of processes that are gone, and machines may
    disagree on the number of restarts. So each rank publishes a random nonce, then a hash of all nonces; equal hashes
    prove that all saw the nonces of this start. Raises DistError when that takes too long.
    """
    end = time.monotonic() + PATIENCE.total_seconds()
    store.set(f"nib/nonce/{rank}", secrets.token_hex(16))
    while True:
        nonces = store.multi_get([f"nib/nonce/{other}" for other in range(world)])
        digest = hashlib.sha256(b" ".join(nonces)).hexdigest()
        store.set(f"nib/digest/{rank}", digest)
        digests = store.multi_get([f"nib/digest/{other}" for other in range(world)])
        if set(digests) == {digest.encode()}:
            return dist.PrefixStore(f"nib/{digest}", store)
        if time.monotonic() > end:
            raise dist.DistError(f"they did not come within {PATIENCE}")
        time.sleep(0.01 * world)  # not all of many at once


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turn the body's errors about a process that is gone into a RunError."""
    try:
        yield
    except RuntimeError as error:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone or not (isinstance(error, dist.DistError) or re.search(r"\bgloo/.+\.cc:\d+\]", str(error))):
            raise
        who, reason = os.environ.get("RANK", "0"), str(error).splitlines()[0]
        how = "The same command goes on from the newest checkpoint; torchrun --max-restarts=N does so by itself"
        raise RunError(f"process {who} lost the others: {reason}. {how}") from None


# To import FSDP and its sharded tensors takes 0.9 of the 2.2 seconds that it takes to begin, so only those who use
# them do; others know such modules and tensors by their methods.


def is_sharded(thing: Tensor | nn.Module) -> bool:
    """Whether a tensor is a DTensor, or a module one that FSDP's fully_shard was applied to."""
    return hasattr(thing, "full_tensor" if isinstance(thing, Tensor) else "set_requires_gradient_sync")


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together from all processes when it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(target: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which all processes hold, sharded as `target` is."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    where = (tensor.to(target.device), sharded.device_mesh, sharded.placements)
    try:
        return distribute_tensor(*where, src_data_rank=None)
    except TypeError:  # torch 2.6 always sends what the first process holds
        return distribute_tensor(*where)


def reshard(model: nn.Module) -> None:
    """Give back what a forward pass without a backward pass left together of a sharded model."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]
