"""What a training run is besides its loop: where it stands, what it resumes from, when it is asked to stop."""

from __future__ import annotations

import itertools
import math
import os
import platform
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nib.common.device import Precision, is_out_of_memory
from nib.common.exits import InputError, RunError
from nib.common.signals import STOP_SIGNALS
from nib.common.wording import counted
from nib.data.dataset import Dataset
from nib.data.paths import find_dataset
from nib.data.prepare import BUILTIN_DATASETS, prepare_builtin
from nib.data.shards import staging_path
from nib.formats.checkpoint import (
    BrokenCheckpoint,
    Checkpoint,
    list_checkpoints,
    name_restored,
    named_checkpoint,
    newest_good,
)
from nib.training.distributed import Cluster, own_place, reshard, whole
from nib.training.report import Reporter, command_line
from nib.training.settings import TrainSettings, as_dict, same_run
from nib.training.state import Saver, load_optimizer_tensors, optimizer_tensors

# How long the other processes wait for a built-in corpus while there is no sign of the first process's work, and while
# its files stay as they are. A network file system shows a new name after up to a minute.
ABSENT_SECONDS, SILENT_SECONDS = 120.0, 600.0


@dataclass
class Progress:
    """How far the run is: what a checkpoint remembers besides tensors."""

    step: int = 0  # optimizer steps done
    tokens: int = 0
    seconds: float = 0.0  # of training, without validation and saving
    best_val_loss: float = 1e30  # JSON has no infinity
    skipped_steps: int = 0  # because the loss or the gradient was not finite
    skipped_in_a_row: int = 0


class StopSignal:
    """Remembers that SIGINT, SIGTERM or SIGHUP came, so that the step can end and be saved.

    A second SIGINT or SIGTERM stops at once. A second SIGHUP does not: the kernel, the shell and torchrun each send
    one when a terminal is closed. Where SIGHUP is ignored, as under nohup, it stays so. With `at_once` the first stops.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.number, self.at_once = 0, at_once
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self.before = {number: signal.signal(number, self._arrived) for number in {*STOP_SIGNALS} - ignored}

    def _arrived(self, number: int, frame: object) -> None:
        if self.at_once or self.number == number != signal.SIGHUP:
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
        resume = not self.settings.eval_only  # which needs no optimizer
        found = newest_good(self.out_dir / "checkpoints", optimizer=resume) if self.cluster.first else None
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
        checkpoint = found or Checkpoint(path, optimizer=resume)
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
        """Put back all but the weights, which the model was built with, as it was when the checkpoint was made.

        With eval_only that is the progress alone, and nothing is written.
        """
        names = parameter_names(model)
        try:
            if not self.settings.eval_only:
                load_optimizer_tensors(optimizers, names, checkpoint.optimizer())
            self.precision.scaler.load_state_dict(checkpoint.state["scaler"])
            self.progress = Progress(**checkpoint.state["progress"])
            if not all(type(value) in (int, float) for value in asdict(self.progress).values()):
                raise TypeError("its progress is not in numbers")
        except (RuntimeError, KeyError, TypeError) as error:
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise BrokenCheckpoint(f"{checkpoint.directory} does not fit this run: {error}. Use another") from None
        checkpoint.release()
        if self.cluster.first and not self.settings.eval_only:
            name_restored(self.saver.checkpoints, checkpoint.directory.name, checkpoint.state.get("best") is True)
        self.saved_step = self.progress.step

    def count_step(
        self, loss: float, grad_norm: float, model: nn.Module, optimizers: list[torch.optim.Optimizer], report: Reporter
    ) -> None:
        """Count a step that was done, or skipped because its numbers were not finite.

        Raises RunError after max_skipped_steps of these in a row, with all that was learned before them saved.
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
            self.saver.keep = 0  # the older ones are what one may want to go back to
            if not self.unchanged():
                self.save(model, optimizers, report)
            try:
                self.saver.finish()
            except RunError as error:
                report.say(f"warning: {error}")
            self.cluster.stop()  # torchrun ends all processes when one has ended: not before the first has written
            raise RunError(
                f"loss or gradient was not finite in {counted(limit, 'step')} in a row, the last of them step "
                f"{progress.step}. {self.way_back()}"
            )

    def way_back(self) -> str:
        """For a run that diverged: its newest checkpoint, and the command that starts anew with lower rates.

        It starts from the best checkpoint, else from the newest from which an update was made: later weights are
        those that gave no finite number. Where there is neither, it starts where this run did.
        """
        settings, checkpoints = self.settings, self.saver.checkpoints
        last_update = self.progress.step - self.progress.skipped_in_a_row
        older = [path.name for path in list_checkpoints(checkpoints) if int(path.name[5:]) < last_update]
        source = named_checkpoint(checkpoints, "best") or next(iter(older), "")
        named = self.out_dir if self.out_dir.name not in ("", "..") else self.out_dir.resolve()  # . has no name
        changes: dict[str, Any] = {"out_dir": next(
            place for number in itertools.count(2) if not Path(place := f"{named}-{number}").exists()
        )}  # fmt: skip
        if source:
            changes["init_from"] = checkpoints / source
        if settings.resume == "must":
            changes["resume"] = "auto"
        for name in ("learning_rate", "muon_learning_rate")[: 2 if settings.optimizer == "muon" else 1]:
            changes[name] = f"{min(getattr(settings, name) / 10, getattr(TrainSettings, name)):g}"
        if settings.min_lr:
            changes["min_lr"] = f"{settings.min_lr / settings.learning_rate * float(changes['learning_rate']):g}"
        command = " ".join([command_line(), *(shlex.quote(f"--{name}={value}") for name, value in changes.items())])
        latest = named_checkpoint(checkpoints, "latest")
        newest = f"The newest checkpoint is {checkpoints / latest}" if latest else "There is no checkpoint"
        start = f"go back to {source}" if source else "start again"
        return f"{newest}; {start} with a lower learning rate: {command}"

    def unchanged(self) -> bool:
        """Whether the newest checkpoint holds the weights as they are: all steps since then were skipped."""
        return self.progress.step - self.progress.skipped_in_a_row <= self.saved_step

    def save(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], report: Reporter, best: bool = False
    ) -> None:
        """Copy the state and write it in the background; when the write before this one failed, say so and go on.

        Weights with numbers that are not finite are not saved: the checkpoint before is the better one.
        """
        weights, optimizer = snapshot(model, optimizers, keep=self.cluster.first)
        finite = all(tensor.isfinite().all() for tensor in weights.values())
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

    def checkpoint_due(self) -> bool:
        """Whether it is time to save, by the steps or by the first process's clock.

        Not while all steps are skipped: the same weights again and again would push out older ones.
        """
        settings = self.settings
        if self.unchanged():
            return False
        limit = settings.checkpoint_seconds
        return due(self.progress.step, settings.checkpoint_interval) or bool(
            limit and self.cluster.from_first(time.monotonic() - self.saved_at >= limit)
        )


def open_dataset(name: str) -> Dataset:
    """The prepared directory NAME, or data/NAME. A built-in corpus that is missing is prepared by the first process.

    Called before the processes connect: preparing may take longer than they would wait for each other.
    Raises InputError.
    """
    directory = find_dataset(name)
    if not directory.exists() and name in BUILTIN_DATASETS:
        if own_place().rank == 0:
            prepare_builtin(name)
        else:
            wait_for_dataset(directory)
    if not directory.exists():
        have = sorted(path.parent.name for path in Path("data").glob("*/meta.json"))
        prepared = f" Prepared: {', '.join(have)}." if have else ""
        raise InputError(
            f"there is no dataset {name!r} under data/.{prepared} Built in: {', '.join(BUILTIN_DATASETS)}. "
            f"Make it with: python prepare_data.py SOURCE --out {shlex.quote(f'data/{Path(name).name}')}"
        )
    return Dataset(directory)


def wait_for_dataset(directory: Path) -> None:
    """Return when the first process has prepared `directory`.

    Raises RunError when nothing is seen of its work for too long: it failed, never came, or has another file system.
    """
    print(f"waiting for process 0 to prepare {directory}", file=sys.stderr)
    seen, since = None, time.monotonic()
    while True:
        work = [staging_path(directory), *staging_path(directory).glob("**/*")]
        now = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in work if path.exists()]
        if directory.exists():  # looked at after the work, which it replaces
            return
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > (SILENT_SECONDS if now else ABSENT_SECONDS):
            raise RunError(
                f"process 0 is not preparing {directory}. See its message, or unset RANK if this is the only process, "
                f"or prepare it first: python prepare_data.py {directory.name}"
            )
        time.sleep(0.2)


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
