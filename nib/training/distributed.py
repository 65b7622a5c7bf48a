"""One process or many: the rank of this process, and communication between all of them."""

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

# The longest wait of one process for another. All do the same work, so a wait of minutes means that one is gone.
PATIENCE = timedelta(minutes=10)
SILENCE = 20.0  # seconds of waiting before a message says so


@dataclass
class Cluster:
    """The processes of one run. Values on the CPU are exchanged over gloo, without synchronising with a GPU."""

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
        """The sum over processes of each element of a tensor on the device, without waiting for the result."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_first(self, value: Any) -> Any:
        """The first process's value, on all processes."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, seconds: float, signal_number: int) -> tuple[float, int]:
        """The first process's clock, and a signal that any process received, so that all take the same decisions."""
        if self.world == 1:
            return seconds, signal_number
        sent = [signal_number == each for each in STOP_SIGNALS]
        clock, *counts = self.total([seconds if self.first else 0.0, *map(float, sent)])
        return clock, next((each for each, count in zip(STOP_SIGNALS, counts, strict=True) if count), 0)

    def stop(self) -> None:
        """Wait for all processes before exiting: one that exits first would break the others' connections."""
        self.total([0.0])


class Place(NamedTuple):
    rank: int
    world: int
    local_rank: int


def own_place() -> Place:
    """The rank of this process and the number of processes, from torchrun's environment. Raises InputError.

    A single process has rank 0, even if a notebook or an earlier job has left another RANK in the environment.
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
    """Connect to the other processes if torchrun started several: NCCL between GPUs, gloo between CPUs."""
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
    """Raise InputError if two processes use the same GPU, which NCCL does not allow; `gpus` has the UUID of each."""
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            who = f"processes {gpus.index(gpu)} and {rank} share one GPU"
            raise InputError(f"{who}. Start one process per GPU, or set CUDA_VISIBLE_DEVICES for each process")


def connect(backend: str) -> None:
    """Make the process group. Raises RuntimeError if the processes cannot reach each other.

    Every step may take all of PATIENCE: connecting looks up names of addresses, and without a name server one process
    may wait 10 seconds for each while the others are already waiting.
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
    """The store under a prefix on which these `world` processes agree and which no earlier start used.

    After a restart torchrun provides the same store, with the addresses of processes that are gone, and machines may
    disagree on the number of restarts. So each rank publishes a random nonce, then a hash of all nonces. Equal hashes
    prove that all saw the nonces of this start. Raises DistError if that takes longer than PATIENCE.
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
        time.sleep(0.01 * world)  # limits the load on the store


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """Turn errors of the body about a lost process into a RunError."""
    try:
        yield
    except RuntimeError as error:
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone or not (isinstance(error, dist.DistError) or re.search(r"\bgloo/.+\.cc:\d+\]", str(error))):
            raise
        who, reason = os.environ.get("RANK", "0"), str(error).splitlines()[0]
        how = "The same command resumes from the newest checkpoint; torchrun --max-restarts=N restarts by itself"
        raise RunError(f"process {who} lost the others: {reason}. {how}") from None


# Importing FSDP and its sharded tensors takes 0.9 of the 2.2 seconds of start-up, so only runs that use them do so.
# Sharded modules and tensors are recognised by their methods instead.


def is_sharded(thing: Tensor | nn.Module) -> bool:
    """Whether a tensor is a DTensor, or a module was sharded by FSDP's fully_shard."""
    return hasattr(thing, "full_tensor" if isinstance(thing, Tensor) else "set_requires_gradient_sync")


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(target: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which all processes hold, sharded like `target`."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = target
    where = (tensor.to(target.device), sharded.device_mesh, sharded.placements)
    try:
        return distribute_tensor(*where, src_data_rank=None)
    except TypeError:  # torch 2.6 lacks src_data_rank and always sends the first process's tensor
        return distribute_tensor(*where)


def reshard(model: nn.Module) -> None:
    """Reshard parameters that a forward pass without a backward pass left gathered."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]
