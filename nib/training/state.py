"""The run directory: one run at a time in it, checkpoints written in a background thread, the optimizers' state."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nib.common.device import is_out_of_memory
from nib.common.exits import WRITER, InputError, RunError
from nib.common.wording import counted
from nib.formats import checkpoint as files
from nib.formats.checkpoint import BrokenCheckpoint, Checkpoint, name_checkpoint, named_checkpoint, write_checkpoint
from nib.tokenizer.tokenizer import Tokenizer
from nib.training.distributed import like, reshard, whole

if TYPE_CHECKING:
    from nib.training.run import Run


def lock_run(out_dir: Path) -> IO[str]:
    """Make the run directory and hold it until the returned file is closed or the process ends, however it ends.

    Raises InputError when another run holds it or it cannot be made. Leftovers of killed runs are removed.
    """
    try:
        (out_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = (out_dir / ".lock").open("a+")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run is writing to {out_dir}. Wait for it, or give another --out_dir") from None
    except OSError as error:
        raise InputError(f"cannot write to {out_dir}: {error.strerror}. Give another --out_dir") from None
    checkpoints = out_dir / "checkpoints"
    for leftover in (*checkpoints.glob(".*.partial"), *checkpoints.glob(".*.staging")):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return lock


@dataclass
class Progress:
    """How far the run is: what a checkpoint remembers besides tensors."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, without validation and saving
    best_val_loss: float = 1e30  # JSON has no infinity
    skipped_steps: int = 0  # because the loss or the gradient was not finite
    skipped_in_a_row: int = 0


class Saver:
    """Writes checkpoints in a thread, one at a time; training waits only for the copy of its state.

    A checkpoint that the disk does not take is reported and the one before stays good. A kill while one is being
    written loses only that one.
    """

    def __init__(self, out_dir: Path, keep: int, tokenizer: Tokenizer) -> None:
        self.checkpoints, self.keep, self.tokenizer = out_dir / "checkpoints", keep, tokenizer
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], best: bool) -> None:
        """Begin to write; the tensors must not change any more. Raises RunError when the write before this failed."""
        self.finish()
        arguments = (weights, optimizer, state, best)
        self.thread = threading.Thread(target=self._write, args=arguments, name=WRITER)
        self.thread.start()

    def _write(
        self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], best: bool
    ) -> None:
        try:
            place = write_checkpoint(self.checkpoints, weights, optimizer, state, self.tokenizer)
            if best:
                name_checkpoint(self.checkpoints, "best", place.name)
            files.remove_old(self.checkpoints, self.keep, place.name)
        except Exception as error:  # raised again in `finish`, in the thread that trains
            self.error = error

    def wait(self) -> None:
        """Wait for the write under way, whether it fails or not."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def finish(self) -> None:
        """Wait for the write under way. Raises RunError when it failed."""
        self.wait()
        if self.error is not None:
            error, self.error = self.error, None
            if not isinstance(error, OSError):
                raise error
            reason = error.strerror or str(error)
            free = shutil.disk_usage(self.checkpoints).free // 2**20 if os.path.isdir(self.checkpoints) else 0
            latest = named_checkpoint(self.checkpoints, "latest")
            before = f"the checkpoint before it, {latest}, is intact" if latest else "there is no checkpoint before it"
            raise RunError(
                f"the checkpoint could not be written to {self.checkpoints}: {reason} ({free} MB free). "
                f"Make room, or lift the limit on the size of files; {before}"
            )


def optimizer_tensors(optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizers' state by "parameter:kind", the same whatever processes or groups it was kept in."""
    return {
        f"{names[parameter]}:{kind}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }


def load_optimizer_tensors(
    optimizers: list[torch.optim.Optimizer], names: Mapping[Tensor, str], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took. Raises BrokenCheckpoint for state of other parameters or shapes."""
    by_name: dict[str, dict[str, Tensor]] = {}
    lacking = tensors and {names[p] for o in optimizers for g in o.param_groups for p in g["params"]} - {
        key.rpartition(":")[0] for key in tensors
    }
    if lacking:
        raise BrokenCheckpoint(f"there is no optimizer state of {min(lacking)}. Use another checkpoint")
    for key, value in tensors.items():
        name, _, kind = key.rpartition(":")
        by_name.setdefault(name, {})[kind] = value
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                saved = by_name.pop(names[parameter], {})
                for kind, value in saved.items():
                    if value.ndim and value.shape != parameter.shape:
                        raise BrokenCheckpoint(f"optimizer state of {names[parameter]} has another shape. Use another")
                    # A copy: what was read may lie in a mapped file, at an address that is not aligned.
                    value = value.to(parameter.device, copy=True)
                    optimizer.state[parameter][kind] = like(parameter, value) if value.ndim else value
    if by_name:
        raise BrokenCheckpoint(f"optimizer state of unknown parameter {next(iter(by_name))!r}. Use another checkpoint")


def snapshot(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], keep: bool = True, part: str = ""
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies in CPU memory of the weights and the optimizers' state, which training cannot change any more.

    Of the weights only those are copied that have `part` in their name. Sharded tensors are put together one at a
    time, with the help of all processes; those with `keep` get the copies.
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
    """Put back all but the weights, which the model was built with, as it was when the checkpoint was made.

    With eval_only that is the progress alone, and nothing is written.
    """
    names = parameter_names(run.model)
    try:
        if not run.settings.eval_only:
            load_optimizer_tensors(run.optimizers, names, checkpoint.optimizer())
        run.precision.scaler.load_state_dict(checkpoint.state["scaler"])
        run.progress = Progress(**checkpoint.state["progress"])
        if not all(type(value) in (int, float) for value in asdict(run.progress).values()):
            raise TypeError("its progress is not in numbers")
    except (RuntimeError, KeyError, TypeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise BrokenCheckpoint(f"{checkpoint.directory} does not fit this run: {error}. Use another") from None
    before, threads = checkpoint.state.get("threads"), torch.get_num_threads()
    if run.cluster.device.type == "cpu" and type(before) is int and before != threads:  # older ones do not say
        change = f"a process had {counted(before, 'thread')} until here, now {threads}"
        run.report.say(f"warning: {change}: sums may round otherwise. OMP_NUM_THREADS={before} keeps every bit")
    checkpoint.release()
    if run.cluster.first and not run.settings.eval_only:
        is_best = checkpoint.state.get("best") is True
        files.name_restored(run.out_dir / "checkpoints", checkpoint.directory.name, is_best)
    run.saved_step = run.progress.step
