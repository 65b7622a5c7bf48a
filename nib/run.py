"""What a training run is besides its loop: where it stands, what it resumes from, when it is asked to stop."""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from nib.checkpoint import (
    BrokenCheckpoint,
    Checkpoint,
    load_optimizer_tensors,
    name_restored,
    named_checkpoint,
    newest_good,
    optimizer_tensors,
)
from nib.dataset import Dataset
from nib.device import Precision, is_out_of_memory
from nib.distributed import Cluster, reshard, whole
from nib.errors import InputError, RunError
from nib.names import find_dataset
from nib.prepare import BUILTIN_DATASETS, prepare_builtin
from nib.report import Reporter
from nib.saver import Saver
from nib.settings import TrainSettings, as_dict, same_run


@dataclass
class Progress:
    """How far the run is: what a checkpoint remembers besides tensors."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, without validation and saving
    best_val_loss: float = 1e30  # JSON has no infinity
    skipped_steps: int = 0  # because the loss or the gradient was not finite
    skipped_in_a_row: int = 0


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Remembers that SIGINT or SIGTERM came, so that the step can end and be saved. A second one stops at once."""

    def __init__(self) -> None:
        self.number = 0
        self.before = {number: signal.signal(number, self._arrived) for number in STOP_SIGNALS}

    def _arrived(self, number: int, frame: object) -> None:
        if self.number == number:
            os._exit(128 + number)
        self.number = number

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Run:
    """One run directory while it is trained: resuming from it and saving to it."""

    def __init__(self, settings: TrainSettings, dataset: Dataset, cluster: Cluster, precision: Precision) -> None:
        self.settings, self.dataset, self.cluster, self.precision = settings, dataset, cluster, precision
        self.out_dir = Path(settings.out_dir)
        self.progress = Progress()
        self.saver = Saver(self.out_dir, settings.keep_checkpoints, dataset.tokenizer)
        self.saved_step = -1
        self.saved_at = time.monotonic()
        self.micro_batch_size = 0

    def checkpoint(self, given: set[str]) -> Checkpoint | None:
        """The newest whole checkpoint, agreed on by all processes, or None for a new run.

        Raises InputError, also where the settings, of which the user gave those named in `given`, make another run.
        """
        found = newest_good(self.out_dir / "checkpoints", optimizer=True) if self.cluster.first else None
        path = self.cluster.from_first(found.directory if found else None)
        if path is None:
            if self.settings.resume == "must":
                raise InputError(
                    f"there is no checkpoint in {self.out_dir} to resume. Use --resume=auto to start a run"
                )
            return None
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # by torchrun: it is this run's own
        if self.settings.resume == "never" and not restarted:
            raise InputError(f"{self.out_dir} already holds a run. Give another --out_dir, or remove it to start again")
        checkpoint = found or Checkpoint(path, optimizer=True)
        try:
            saved, corpus = dict(checkpoint.state["settings"]), checkpoint.state["corpus"]
        except (KeyError, TypeError, ValueError):
            raise BrokenCheckpoint(f"{path} lacks the settings of its run. Use another checkpoint") from None
        if self.settings.init_from != "scratch" and "block_size" not in given:  # it was taken from there
            self.settings.block_size = saved.get("block_size", self.settings.block_size)
        same_run(self.settings, saved, str(self.out_dir))
        if corpus != self.dataset.fingerprint():
            what = f"{self.dataset.directory} is not the corpus that the run in {self.out_dir} began with"
            raise InputError(f"{what}. Give another --out_dir to train on it")
        return checkpoint

    def restore(self, checkpoint: Checkpoint, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
        """Put back all but the weights, which the model was built with, as it was when the checkpoint was made."""
        names = parameter_names(model)
        try:
            load_optimizer_tensors(optimizers, names, checkpoint.optimizer())
            self.precision.scaler.load_state_dict(checkpoint.state["scaler"])
            self.progress = Progress(**checkpoint.state["progress"])
            if not all(type(value) in (int, float) for value in asdict(self.progress).values()):
                raise TypeError("its progress is not in numbers")
        except (RuntimeError, KeyError, TypeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise BrokenCheckpoint(f"{checkpoint.directory} does not fit this run: {error}. Use another") from None
        if self.cluster.first:
            name_restored(self.saver.checkpoints, checkpoint.directory.name, checkpoint.state.get("best") is True)
        self.saved_step = self.progress.step

    def count_step(self, loss: float, grad_norm: float, report: Reporter) -> None:
        """Count a step that was done, or skipped because its numbers were not finite.

        Raises RunError after max_skipped_steps of these in a row.
        """
        progress, limit = self.progress, self.settings.max_skipped_steps
        progress.step += 1
        if math.isfinite(loss + grad_norm):
            progress.skipped_in_a_row = 0
            return
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        report.say(f"warning: step {progress.step} is skipped: loss {loss:g}, gradient norm {grad_norm:g}")
        if limit and progress.skipped_in_a_row >= limit:
            try:
                self.saver.finish()
            except RunError as error:
                report.say(f"warning: {error}")
            latest = named_checkpoint(self.saver.checkpoints, "latest")
            back = f"The newest checkpoint is {self.saver.checkpoints / latest}" if latest else "There is no checkpoint"
            raise RunError(
                f"loss or gradient was not finite in {limit} steps in a row, the last of them step {progress.step}. "
                f"{back}; lower the learning rate, or check the data"
            )

    def save(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], report: Reporter, best: bool = False
    ) -> None:
        """Copy the state and write it in the background; when the write before this one failed, say so and go on.

        A state with numbers that are not finite is not saved: the checkpoint before it is the better one.
        """
        weights, optimizer = snapshot(model, optimizers, keep=self.cluster.first)
        finite = not self.progress.skipped_in_a_row and all(tensor.isfinite().all() for tensor in weights.values())
        if self.cluster.total([float(not finite)]) != [0.0]:  # only the first process has the weights
            report.say(f"warning: step {self.progress.step} is not saved: its numbers are not finite")
            return
        self.saved_step, self.saved_at = self.progress.step, time.monotonic()
        if not self.cluster.first:
            return
        state = {
            "model_config": asdict(model.config),  # type: ignore[call-overload]
            "progress": asdict(self.progress),
            "step": self.progress.step,
            "best": best,
            "settings": as_dict(self.settings),
            "corpus": self.dataset.fingerprint(),
            "scaler": self.precision.scaler.state_dict(),
            "processes": self.cluster.world,
            "micro_batch_size": self.micro_batch_size,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        try:
            self.saver.finish()
        except RunError as error:
            report.say(f"warning: {error}")
        self.saver.save(weights, optimizer, state, best)

    def overdue(self) -> bool:
        """Whether checkpoint_seconds have passed since the last save, by the first process's clock."""
        limit = self.settings.checkpoint_seconds
        return bool(limit and self.cluster.from_first(time.monotonic() - self.saved_at >= limit))


def open_dataset(name: str) -> Dataset:
    """The prepared directory NAME, or data/NAME. A built-in corpus that is missing is prepared by the first process.

    Called before the processes connect: preparing may take longer than they would wait for each other.
    Raises InputError.
    """
    directory = find_dataset(name)
    if not directory.exists() and name in BUILTIN_DATASETS:
        if os.environ.get("RANK", "0") == "0":
            prepare_builtin(name)
        while not directory.exists():
            time.sleep(0.2)
    if not directory.exists():
        have = sorted(path.parent.name for path in Path("data").glob("*/meta.json"))
        prepared = f" Prepared: {', '.join(have)}." if have else ""
        raise InputError(
            f"there is no dataset {name!r} under data/.{prepared} Built in: {', '.join(BUILTIN_DATASETS)}. "
            f"Make it with: python prepare_data.py SOURCE --out {shlex.quote(f'data/{Path(name).name}')}"
        )
    return Dataset(directory)


def snapshot(
    model: nn.Module, optimizers: list[torch.optim.Optimizer], keep: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies in CPU memory of the weights and the optimizers' state, which training cannot change any more.

    Sharded tensors are put together one at a time, with the help of all processes; those with `keep` get the copies.
    """
    reshard(model)
    copies: list[dict[str, torch.Tensor]] = []
    for tensors in (model.state_dict(), optimizer_tensors(optimizers, parameter_names(model))):
        full = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        copies.append({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in full if keep})
    return copies[0], copies[1]


def parameter_names(model: nn.Module) -> dict[torch.Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def due(step: int, interval: int) -> bool:
    return bool(interval) and step % interval == 0
