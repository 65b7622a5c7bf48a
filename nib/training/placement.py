"""Fitting a run to its device: micro-batch size, compilation, DDP or FSDP."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nib.common.device import Precision, is_out_of_memory
from nib.common.exits import InputError, RunError
from nib.common.wording import counted
from nib.training.distributed import Cluster, is_sharded
from nib.training.report import Reporter
from nib.training.settings import TrainSettings
from nib.training.step import exchanging

# Larger micro-batches are no faster on a CPU, only larger. In tokens x width x layers; about 17 such numbers are kept
# for the backward pass, so this is 1 GB, or one sequence of GPT-2's.
CPU_ACTIVATIONS = 2**24
# A GPU should be busy with that many tokens (not measured); beyond, the loss unrolls into more and more chunks.
GPU_TOKENS = 2**16
# Tensor cores want whole tiles: nanoGPT's author saw GPT-2's vocabulary of 50257 cost a quarter of a step's speed.
GPU_VOCAB_MULTIPLE = 64
# Lengths of conversations in a batch: each is compiled for. torch gives up at the ninth.
COMPILED_WIDTHS = 8


def micro_batch_sizes(batch_size: int, micro_batch_size: int, world: int) -> list[int]:
    """The micro-batch sizes that split one process's share of the batch evenly, largest first; one where it is set.

    Raises InputError for a split that does not come out even.
    """
    if batch_size % world:
        near = max(1, round(batch_size / world)) * world
        raise InputError(f"batch_size {batch_size} does not divide by {world} processes. Use {near}")
    local = batch_size // world
    sizes = [size for size in range(local, 0, -1) if local % size == 0]
    if not micro_batch_size:
        return sizes
    if micro_batch_size not in sizes:
        allowed = ", ".join(map(str, sizes))
        raise InputError(
            f"micro_batch_size {micro_batch_size} does not divide the {counted(local, 'sequence')} of one process. "
            f"Use {allowed}, or 0 for an automatic one"
        )
    return [micro_batch_size]


def place(model: nn.Module, settings: TrainSettings, precision: Precision, cluster: Cluster) -> nn.Module:
    """The model on its device: whole, or with parallel=fsdp sharded over the processes (arXiv 2304.11277).

    Blocks go to the device one by one, so that no device ever holds the whole model.
    """
    set_limits(model, settings, cluster.device)
    if settings.parallel == "ddp" or cluster.world == 1:
        return model.to(cluster.device)
    if precision.dtype == torch.float16:
        raise InputError("parallel=fsdp does not work with float16. Use --dtype=bfloat16 or float32")
    if cluster.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise InputError("parallel=fsdp between CPUs needs torch 2.7 or later. Use --parallel=ddp")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=precision.dtype, reduce_dtype=torch.float32)
    mesh = init_device_mesh(cluster.device.type, (cluster.world,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.compute_dtype = precision.dtype  # type: ignore[assignment]  # of the keys and values that sampling caches
    for method in ("hidden", "logits"):
        register_fsdp_forward_method(model, method)
    return model


def set_limits(model: Any, settings: TrainSettings, device: torch.device) -> None:
    """Tell the model what it may keep in memory on the device."""
    model.activation_checkpointing = settings.activation_checkpointing
    if device.type == "cuda":
        model.max_logits, model.vocab_multiple = 0, GPU_VOCAB_MULTIPLE


def fit_to_device(
    model: nn.Module,
    settings: TrainSettings,
    precision: Precision,
    cluster: Cluster,
    report: Reporter,
    rows: int = 1,
) -> tuple[int, nn.Module]:
    """The micro-batch size of a process, and the model ready to train: wrapped in DDP, compiled where asked.

    A sequence of the batch has so many `rows`. An automatic size is the largest that trial passes, uncompiled and then
    compiled, have memory for, up to one that is known to be large enough. Raises RunError when not even one fits.
    """
    sizes = micro_batch_sizes(settings.batch_size, settings.micro_batch_size, cluster.world)
    local = sizes[0]
    if not settings.micro_batch_size:
        sizes = large_enough(sizes, rows * settings.block_size, model.config, cluster.device)

    def most(ready: nn.Module) -> tuple[int, Exception | None]:
        """The largest of `sizes` that fits, and what else went wrong, also in another process."""
        for size in sizes:
            failure = trial(ready, model, rows * size, settings.block_size, precision, accumulates=size < local)
            out_of_memory = failure is not None and is_out_of_memory(failure)
            short, broken = cluster.total([float(out_of_memory), float(failure is not None and not out_of_memory)])
            if broken:
                return size, failure or RunError("another process could not run the model. See its message")
            if not short:
                return size, None
        raise RunError(f"a micro-batch of {sizes[-1]} does not fit into memory. Use a smaller model or block_size")

    ready: nn.Module = model
    if cluster.world > 1 and settings.parallel == "ddp":
        # Buffers are tables that never change. Newer releases of torch have another name for not sending them around.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        ready = DistributedDataParallel(model, **options)
    size, failure = most(ready)
    if failure:
        raise failure
    if is_compiled(settings, cluster.device):
        sizes = sizes[sizes.index(size) :]
        # For this shape alone: torch's kernels for any shape are slower. DDP's buckets become a graph each, whose
        # gradients are exchanged while the next ones are computed.
        compiled: Any = torch.compile(ready, dynamic=False)
        fits, failure = most(compiled)
        if failure is None:
            return fits, compiled
        reason = str(failure).strip().splitlines()[0]
        report.say(f"warning: torch.compile failed, training goes on uncompiled: {reason}")
    return size, ready


def is_compiled(settings: TrainSettings, device: torch.device) -> bool:
    return settings.compile == "true" or (settings.compile == "auto" and device.type == "cuda")


def large_enough(sizes: list[int], block_size: int, shape: Any, device: torch.device) -> list[int]:
    """Those of the sizes, largest first, that are not larger than pays; the smallest where all are."""
    if device.type == "cpu":
        most = CPU_ACTIVATIONS // (block_size * shape.n_embd * shape.n_layer)
    else:
        most = GPU_TOKENS // block_size
    return [size for size in sizes if size <= most] or sizes[-1:]


def trial(
    ready: nn.Module, model: Any, size: int, block_size: int, precision: Precision, accumulates: bool
) -> Exception | None:
    """A forward and backward pass whose result is thrown away, beside as much memory as AdamW's state will take.

    Where a step accumulates gradients, beside those too, which FSDP holds whole until it exchanges them. What a pass
    leaves in a model's buffers, as running means, is taken back: a resumed run must not see it.

    Returns the error it ended in, if it did, without the frames that hold memory where that was what it lacked.
    """
    device, before = precision.device, {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        room = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
        if accumulates:
            room += [torch.empty(parameter.shape, device=device) for parameter in trained]
        tokens, targets = torch.zeros(2, size, block_size, dtype=torch.int64, device=device)
        # With DDP nothing is exchanged: a process without memory would leave the others waiting.
        with exchanging(ready, is_sharded(model)), precision.training(masked=model.config.window > 0):
            _, loss = ready(tokens, targets)
        loss.sum().backward()
        del room, loss
    except (RuntimeError, MemoryError) as error:
        return error.with_traceback(None) if is_out_of_memory(error) else error
    finally:
        model.zero_grad(set_to_none=True)
        for name, buffer in before.items():
            model.get_buffer(name).copy_(buffer)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
    return None
