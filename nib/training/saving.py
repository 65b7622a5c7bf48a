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
from nib.training.state import snapshot

if TYPE_CHECKING:
    from nib.training.dpo import PreferenceValidation
    from nib.training.run import Run
    from nib.training.validation import Validation


def lock_run(out_dir: Path) -> IO[str]:
    """Make and lock the run directory until the returned file is closed or the process ends in any way.

    Raises InputError if another run holds the lock or the directory cannot be made. Removes leftovers of killed runs.
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
    """Writes checkpoints in a background thread, one at a time; training waits only while its state is copied.

    If a checkpoint cannot be written, that is reported, and the previous one stays valid. A kill during a write loses
    only the checkpoint that is being written.
    """

    def __init__(self, out_dir: Path, keep: int, tokenizer: Tokenizer) -> None:
        self.checkpoints, self.keep, self.tokenizer = out_dir / "checkpoints", keep, tokenizer
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], best: bool) -> None:
        """Start to write; the tensors must not change any more. Raises RunError if the previous write failed."""
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
        """Wait for the current write, whether it fails or not."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def finish(self) -> None:
        """Wait for the current write. Raises RunError if it failed."""
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
    """Whether to save: after the best validation so far, every checkpoint_interval or every checkpoint_seconds.

    Not while steps are skipped: saving the same weights again would push out older checkpoints.
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
    """Copy the state and write it in a background thread. If the previous write failed, print a warning.

    Weights that are not finite are not saved: the previous checkpoint is better.
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
    dtype = str(run.precision.dtype).removeprefix("torch.")
    state = {
        "model_config": asdict(run.model.config),
        "progress": asdict(run.progress),
        "step": run.progress.step,
        "best": run.best,
        "settings": asdict(run.settings),
        "corpus": run.dataset.fingerprint(),
        **run.objective.state(),
        **({"adapter": run.adapter} if run.adapter else {}),
        "scaler": run.precision.scaler.state_dict(),
        "processes": run.cluster.world,
        "micro_batch_size": run.micro_batch_size,
        "threads": torch.get_num_threads(),
        **({"cpu_dtype": dtype} if run.cluster.device.type == "cpu" else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    finish_saving(run)
    run.saver.save(weights, optimizer, state, run.best)


def finish_saving(run: Run) -> None:
    """Wait for the current write; print a warning if it failed."""
    try:
        run.saver.finish()
    except RunError as error:
        run.report.say(f"warning: {error}")


def unchanged(run: Run) -> bool:
    """Whether the newest checkpoint has the current weights, because all steps since then were skipped."""
    run.read_steps()
    return run.progress.step - run.progress.skipped_in_a_row <= run.saved_step
