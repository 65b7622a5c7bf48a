"""What a run resumes from besides its weights: how far it is, and the optimizers' state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nib.common.device import is_out_of_memory
from nib.common.wording import counted
from nib.formats.checkpoint import BrokenCheckpoint, Checkpoint, name_restored
from nib.training.distributed import like, reshard, whole

if TYPE_CHECKING:
    from nib.training.run import Run


@dataclass
class Progress:
    """The progress of a run, which checkpoints store besides the tensors."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, without validation and saving
    best_val_loss: float = 1e30  # JSON has no infinity
    skipped_in_a_row: int = 0  # steps, because the loss or the gradient was not finite


def optimizer_tensors(optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizers' state by "parameter:kind", independent of the number of processes and of parameter groups."""
    return {
        f"{names[parameter]}:{kind}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer_tensors(
    optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Load what `optimizer_tensors` returned. Raises BrokenCheckpoint for state of other parameters or shapes."""
    lacking = tensors and {*optimizer_tensors(optimizers, names)} - {*tensors}
    if lacking:
        name, _, kind = min(lacking).rpartition(":")
        raise BrokenCheckpoint(f"there is no optimizer state of {name} ({kind}). Use another checkpoint")
    owners = {
        names[parameter]: (parameter, state) for optimizer in optimizers for parameter, state in optimizer.state.items()
    }
    for key, value in tensors.items():
        name, _, kind = key.rpartition(":")
        if name not in owners:
            raise BrokenCheckpoint(f"optimizer state of unknown parameter {name!r}. Use another checkpoint")
        parameter, state = owners[name]
        if value.ndim and value.shape != parameter.shape:
            raise BrokenCheckpoint(f"optimizer state of {name} has another shape. Use another")
        value = value.to(parameter.device, copy=True)  # the tensor may be mapped from a file, at an unaligned address
        state[kind] = like(parameter, value) if value.ndim else value


def snapshot(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], keep: bool = True, part: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies in CPU memory of the weights and the optimizers' state, for a background thread to write.

    Only weights with `part` in their name are copied. Sharded tensors are gathered one at a time, by all processes;
    only those with `keep` store the copies.
    """
    reshard(model)
    copies: list[dict[str, Tensor]] = []
    weights = {name: tensor for name, tensor in model.state_dict().items() if part in name}
    for tensors in (weights, optimizer_tensors(optimizers, parameter_names(model))):
        full = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        copies.append({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in full if keep})
    return copies[0], copies[1]


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Restore everything from the checkpoint except the weights, with which the model was already built.

    With eval_only that is only the progress, and nothing is written.
    """
    names = parameter_names(run.model)
    try:
        if not run.settings.eval_only:
            load_optimizer_tensors(run.optimizers, names, checkpoint.optimizer())
        run.precision.scaler.load_state_dict(checkpoint.state["scaler"])
        saved = checkpoint.state["progress"]
        run.progress = Progress(**{each.name: saved[each.name] for each in fields(Progress)})
        if not all(type(value) in (int, float) for value in asdict(run.progress).values()):
            raise TypeError("its progress has a value that is not a number")
    except (RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise BrokenCheckpoint(f"{checkpoint.directory} does not fit this run: {error}. Use another") from None
    before, threads = checkpoint.state.get("threads"), torch.get_num_threads()
    if run.cluster.device.type == "cpu" and type(before) is int and before != threads:  # older ones lack `threads`
        change = f"a process had {counted(before, 'thread')} until here, now {threads}"
        run.report.say(f"warning: {change}: rounding may differ. OMP_NUM_THREADS={before} gives identical results")
    checkpoint.release()
    if run.cluster.first and not run.settings.eval_only:
        is_best = checkpoint.state.get("best") is True
        name_restored(run.out_dir / "checkpoints", checkpoint.directory.name, is_best)
    run.saved_step = run.progress.step
