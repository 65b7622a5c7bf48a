"""Saving a run: the directory is held by one run at a time, and checkpoints are written in a background thread."""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from nib.common.exits import WRITER, InputError, RunError
from nib.formats.checkpoint import name_checkpoint, named_checkpoint, remove_old, write_checkpoint
from nib.tokenizer.tokenizer import Tokenizer
from nib.training.lora import MARK
from nib.training.settings import as_dict
from nib.training.state import snapshot

if TYPE_CHECKING:
    from nib.training.dpo import PreferenceValidation
    from nib.training.run import Run
    from nib.training.validation import Validation


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

        def write() -> None:
            try:
                place = write_checkpoint(self.checkpoints, weights, optimizer, state, self.tokenizer)
                if best:
                    name_checkpoint(self.checkpoints, "best", place.name)
                remove_old(self.checkpoints, self.keep, place.name)
            except Exception as error:  # raised again in `finish`, in the thread that trains
                self.error = error

        self.thread = threading.Thread(target=write, name=WRITER)
        self.thread.start()

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


def save_due(run: Run, validation: Validation | PreferenceValidation | None) -> bool:
    """Whether it is time to save: after the best validation so far, by the steps, or by the first process's clock.

    Not while all steps are skipped: the same weights again and again would push out older ones.
    """
    run.best = validation is not None and validation.loss < run.progress.best_val_loss
    if validation:
        run.progress.best_val_loss = min(validation.loss, run.progress.best_val_loss)
    limit = run.settings.checkpoint_seconds
    due_now = run.due(run.settings.checkpoint_interval) or bool(
        limit and run.cluster.from_first(time.monotonic() - run.saved_at >= limit)
    )
    return run.best or (due_now and not unchanged(run))


def save(run: Run) -> None:
    """Copy the state and write it in the background; when the write before this one failed, say so and go on.

    Weights with numbers that are not finite are not saved: the checkpoint before is the better one.
    """
    run.read_steps()
    trained = MARK if run.adapter else ""
    weights, optimizer = snapshot(run.model, run.optimizers, keep=run.cluster.first, part=trained)
    finite = all(tensor.isfinite().all() for tensor in weights.values())
    if run.cluster.total([float(not finite)]) != [0.0]:  # only the first process has the weights
        run.report.say(f"warning: step {run.progress.step} is not saved: its numbers are not finite")
        return
    run.saved_step, run.saved_at = run.progress.step, time.monotonic()
    if not run.cluster.first:
        return
    state = {
        "model_config": asdict(run.model.config),
        "progress": asdict(run.progress),
        "step": run.progress.step,
        "best": run.best,
        "settings": as_dict(run.settings),
        "corpus": run.dataset.fingerprint(),
        **run.objective.state(),
        **({"adapter": run.adapter} if run.adapter else {}),
        "scaler": run.precision.scaler.state_dict(),
        "processes": run.cluster.world,
        "micro_batch_size": run.micro_batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    finish_saving(run)
    run.saver.save(weights, optimizer, state, run.best)


def finish_saving(run: Run) -> None:
    """Wait for the write under way; where it failed, say so."""
    try:
        run.saver.finish()
    except RunError as error:
        run.report.say(f"warning: {error}")


def unchanged(run: Run) -> bool:
    """Whether the newest checkpoint holds the weights as they are: all steps since then were skipped."""
    run.read_steps()
    return run.progress.step - run.progress.skipped_in_a_row <= run.saved_step
