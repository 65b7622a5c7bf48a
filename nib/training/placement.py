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
from nib.cpu.bfloat16 import LEAST_WIDTH, has_bfloat16
from nib.formats.checkpoint import Checkpoint
from nib.training.distributed import Cluster, is_sharded
from nib.training.report import Reporter
from nib.training.settings import TrainSettings
from nib.training.step import exchanging, has_window

# The largest useful micro-batch on a CPU, in tokens x width x layers. About 17 such numbers are kept for the backward
# pass, so this is 1 GB, or one sequence of GPT-2. Larger micro-batches are not faster.
CPU_ACTIVATIONS = 2**24
# In 16 bits logits are small, so the head's gradient is computed at once. In chunks it is summed in float32: slower.
CPU_LOGITS_16 = 2**26
# So many tokens should keep a GPU busy (not measured). With more, the loss unrolls into more chunks.
GPU_TOKENS = 2**16
# Tensor cores need whole tiles: nanoGPT's author measured a quarter less speed with GPT-2's vocabulary of 50257.
GPU_VOCAB_MULTIPLE = 64
# The number of different widths of conversation batches: torch.compile compiles each, and stops at the ninth.
COMPILED_WIDTHS = 8


def micro_batch_sizes(batch_size: int, micro_batch_size: int, world: int) -> list[int]:
    """The micro-batch sizes that split one process's share of the batch evenly, largest first; only one if it is set.

    Raises InputError if the split is not even.
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


def training_precision(
    settings: TrainSettings, width: int, cluster: Cluster, checkpoint: Checkpoint | None
) -> Precision:
    """The setting dtype for a model of `width` channels. On a CPU, auto depends on the first process's CPU.

    A run on CPUs resumes in the dtype in which it began, on any kind of CPU.
    """
    name, native = settings.dtype, has_bfloat16()
    if name == "auto" and cluster.device.type == "cpu":
        name = "bfloat16" if cluster.from_first(native) and width >= LEAST_WIDTH else "float32"
        if checkpoint is not None:
            name = "bfloat16" if checkpoint.state.get("cpu_dtype") == "bfloat16" else "float32"
    return Precision(name, cluster.device)


def place(model: nn.Module, settings: TrainSettings, precision: Precision, cluster: Cluster) -> nn.Module:
    """Move the model to its device; with parallel=fsdp it is sharded over the processes (arXiv 2304.11277).

    With FSDP, blocks are moved one by one, so that no device ever holds the whole model.
    """
    set_limits(model, settings, precision)
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
    model.compute_dtype = precision.dtype  # type: ignore[assignment]  # of the KV cache in sampling
    for method in ("hidden", "logits"):
        register_fsdp_forward_method(model, method)
    return model


def set_limits(model: Any, settings: TrainSettings, precision: Precision) -> None:
    """Set the model's memory limits for the device."""
    model.activation_checkpointing = settings.activation_checkpointing
    if precision.device.type == "cuda":
        model.max_logits, model.vocab_multiple = 0, GPU_VOCAB_MULTIPLE
    elif precision.dtype != torch.float32:
        model.max_logits = CPU_LOGITS_16


def fit_to_device(
    model: nn.Module, settings: TrainSettings, precision: Precision, cluster: Cluster, report: Reporter, rows: int
) -> tuple[int, nn.Module]:
    """The micro-batch size of a process, and the model ready to train: wrapped in DDP, and compiled if asked.

    Each sequence of the batch has `rows` rows. An automatic size is the largest for which trial passes, uncompiled and
    then compiled, fit into memory, up to the largest useful size. Raises RunError if the smallest does not fit.
    """
    local = settings.batch_size // cluster.world
    sizes = micro_batch_sizes(settings.batch_size, settings.micro_batch_size, cluster.world)
    sizes = large_enough(sizes, rows * settings.block_size, model.config, cluster.device)

    def most(ready: nn.Module) -> tuple[int, Exception | None]:
        """The largest of `sizes` that fits on all processes, and any other error, also of another process."""
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
        # Buffers are constant tables, so they need no broadcast. Newer torch has another name for this option.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        ready = DistributedDataParallel(model, **options)
    size, failure = most(ready)
    if failure:
        raise failure
    if is_compiled(settings, cluster.device):
        sizes = sizes[sizes.index(size) :]
        # Not dynamic: kernels for any shape are slower. Each DDP bucket becomes one graph, so that its gradients are
        # exchanged while the next ones are computed.
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
    """The sizes, largest first, without those that are larger than useful; the smallest one if all are."""
    if device.type == "cpu":
        most = CPU_ACTIVATIONS // (block_size * shape.n_embd * shape.n_layer)
    else:
        most = GPU_TOKENS // block_size
    return [size for size in sizes if size <= most] or sizes[-1:]


def trial(
    ready: nn.Module, model: Any, size: int, block_size: int, precision: Precision, accumulates: bool
) -> Exception | None:
    """Run a forward and a backward pass to see whether its memory suffices, and discard the result.

    The optimizers must exist by then, since their constructors allocate their state. If a step accumulates gradients
    over several micro-batches, memory for the gradients is taken before the pass, as in all but a step's first; FSDP
    holds them unsharded until the exchange. The model's buffers, such as running means, are restored, so that the
    trial does not change the run.

    Returns the error of the pass, or None. An error for lack of memory has no traceback, which would hold memory.
    """
    device, before = precision.device, {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        room: list[torch.Tensor] = []
        if accumulates and is_sharded(model):
            room = [torch.empty(parameter.shape, device=device) for parameter in trained]
        elif accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        tokens, targets = torch.zeros(2, size, block_size, dtype=torch.int64, device=device)
        # DDP exchanges nothing here: a process that runs out of memory would leave the others waiting.
        with exchanging(ready, is_sharded(model)), precision.training(masked=has_window(model)):
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
