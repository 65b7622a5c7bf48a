"""Checkpoints: complete or absent, verified when read, and without anything that could run code.

out/RUN/checkpoints/step-00000500/   model.safetensors      the weights
                                     optimizer.safetensors  one tensor per parameter and kind of state
                                     state.json             step, settings, shape of the model, counters
                                     nib_tokenizer.json     so that sampling needs no other directory
                                     checksums.json         sha256 of each file above
out/RUN/checkpoints/latest, best     text files that each name one checkpoint
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nib.common.exits import InputError
from nib.common.files import file_sha256, new_directory, plain_file, read_object, write_whole
from nib.common.wording import printable
from nib.tokenizer.load import load_tokenizer
from nib.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer

MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, SUMS_FILE = (
    "model.safetensors", "optimizer.safetensors", "state.json", "checksums.json",
)  # fmt: skip
FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, TOKENIZER_FILE)
RUNS = Path("out")  # the directory of runs that are given by name
KEEP_FILE = "base-of-an-adapter"  # an empty file: a LoRA run began with this checkpoint
STEP_NAME = re.compile(r"step-(\d{8,})")
FORMAT = "nib-checkpoint-1"


class BrokenCheckpoint(InputError):
    """A file of a checkpoint is missing, truncated, changed, or not one that nib wrote."""


class Checkpoint:
    """One checkpoint directory whose files match their checksums. Raises BrokenCheckpoint.

    While the object exists, or until `release`, a running training does not remove the directory as an old checkpoint.
    """

    def __init__(self, directory: Path, optimizer: bool = False) -> None:
        """Check the files; the optimizer's file only if `optimizer`."""
        self.directory = directory
        self.held: IO[bytes] | None = None
        with contextlib.suppress(OSError):  # some file systems have no locks
            self.held = lock_files(directory, fcntl.LOCK_SH, "rb")
        sums = self._json(SUMS_FILE)
        for name in FILES:
            if name == OPTIMIZER_FILE and not optimizer:
                continue
            with self._reading(name) as path:
                if file_sha256(path) != sums.get(name):
                    what = f"{path} is damaged: its sha256 differs from the recorded one"
                    raise BrokenCheckpoint(f"{what}. Use another checkpoint")
        self.state: dict[str, Any] = self._json(STATE_FILE)
        parts = (self.state.get("model_config"), self.state.get("adapter", {}))
        if self.state.get("format") != FORMAT or not all(isinstance(part, dict) for part in parts):
            raise BrokenCheckpoint(f"{directory} was not written by this version of nib. Use a checkpoint that was")
        self.model_config: dict[str, Any] = self.state["model_config"]

    def weights(self) -> dict[str, Tensor]:
        with self._reading(MODEL_FILE) as path:
            return load_file(path)

    def optimizer(self) -> dict[str, Tensor]:
        with self._reading(OPTIMIZER_FILE) as path:
            return load_file(path)

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory / TOKENIZER_FILE)

    def release(self) -> None:
        if self.held:
            self.held.close()

    def _json(self, name: str) -> dict[str, Any]:
        with self._reading(name) as path:
            return read_object(path, 1 << 24)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        path = self.directory / name
        try:
            yield path
        except PermissionError as error:
            raise InputError(f"cannot read {path}: {error.strerror}. Let its owner give you access") from None
        except (OSError, SafetensorError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BrokenCheckpoint(f"cannot read {path}: {reason}. Use another checkpoint") from None


def lock_files(directory: Path, how: int, mode: str) -> IO[Any]:
    """Lock a checkpoint until the returned file is closed: LOCK_SH to read it, LOCK_EX to remove it. Raises OSError."""
    file: IO[Any] = plain_file(directory / SUMS_FILE).open(mode)
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def write_checkpoint(
    checkpoints: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any],
    tokenizer: Tokenizer,
) -> Path:  # fmt: skip
    """Write checkpoints/step-N for N = state["step"] to a temporary directory, fsync, rename, make it `latest`.

    Tensors are on the CPU. Raises OSError if writing fails; then the earlier checkpoints are unchanged.
    """
    place = checkpoints / f"step-{state['step']:08d}"
    with new_directory(place, replace=True) as aside:
        try:
            save_file(weights, aside / MODEL_FILE)
            save_file(optimizer, aside / OPTIMIZER_FILE)
        except SafetensorError as error:  # safetensors wraps OSErrors
            raise OSError(str(error)) from None
        tokenizer.save(aside)
        (aside / STATE_FILE).write_text(json.dumps({"format": FORMAT, **state}, indent=1))
        (aside / SUMS_FILE).write_text(json.dumps({file: file_sha256(aside / file) for file in FILES}, indent=1))
    name_checkpoint(checkpoints, "latest", place.name)
    return place


def name_restored(checkpoints: Path, name: str, best: bool) -> None:
    """Make `latest`, and `best` if it was the best, name the checkpoint from which a run resumes.

    A kill between writing a checkpoint and naming it leaves the previous names.
    """
    for label in ("latest", "best") if best else ("latest",):
        if named_checkpoint(checkpoints, label) != name:
            name_checkpoint(checkpoints, label, name)


def name_checkpoint(checkpoints: Path, label: str, name: str) -> None:
    """Write `name` into checkpoints/`label`, atomically."""
    write_whole(checkpoints / label, f"{name}\n".encode())


def named_checkpoint(checkpoints: Path, label: str) -> str:
    """The name in checkpoints/`label`, or "" if the file is missing or holds anything else than step-N."""
    try:
        name = (checkpoints / label).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return name if STEP_NAME.fullmatch(name) else ""


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """All checkpoints, newest first."""
    found = [path for path in checkpoints.glob("step-*") if STEP_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_good(checkpoints: Path, optimizer: bool = False) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None if there is no checkpoint. Warns of those that it skips.

    Raises InputError if there are checkpoints and all are damaged. If a running training removes one before it is
    locked, the search starts again, since there are newer ones by then.
    """
    paths = list_checkpoints(checkpoints)
    for path in paths:
        try:
            return Checkpoint(path, optimizer)
        except BrokenCheckpoint as error:
            if not path.exists():
                return newest_good(checkpoints, optimizer)
            print(f"warning: {path.name} is skipped: {printable(error)}", file=sys.stderr)
    if paths:
        raise InputError(f"all checkpoints in {checkpoints} are damaged. Remove the directory to start again")
    return None


def remove_old(checkpoints: Path, keep: int, newest: str) -> None:
    """Remove all but the newest `keep` checkpoints (0: keep all), the best one, bases, and those that are being read.

    `newest` is the one just written. Checkpoints of later steps are damaged ones that the run skipped. They do not
    count, and are replaced when the run reaches their steps.
    """
    best = named_checkpoint(checkpoints, "best")
    counted = [path for path in list_checkpoints(checkpoints) if int(path.name[5:]) <= int(newest[5:])]
    for path in counted[keep:] if keep else []:
        if path.name == best or (path / KEEP_FILE).exists():
            continue
        lock: IO[bytes] | None = None
        try:
            lock = lock_files(path, fcntl.LOCK_EX, "rb+")  # NFS needs a writable file for an exclusive lock
        except BlockingIOError:
            continue
        except OSError:
            pass  # a damaged one, or a file system without locks
        doomed = path.with_name(f".{path.name}.partial")  # so that no partly removed one has a checkpoint's name
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
        if lock:
            lock.close()


def newest_run() -> Path:
    """The directory of the run with the newest checkpoint. Raises InputError."""
    runs = [latest for latest in RUNS.glob("*/checkpoints/latest") if named_checkpoint(latest.parent, "latest")]
    if not runs:
        raise InputError(f"there is no run under {RUNS}/. Train one with: python train.py config/small.py")
    return max(runs, key=lambda latest: latest.stat().st_mtime).parent.parent


def open_checkpoint(path: Path) -> Checkpoint | None:
    """A checkpoint's directory, or the one that a file such as checkpoints/latest names, or the newest good of a run.

    None if `path` is none of these. Raises InputError.
    """
    if path.is_file():
        label = path.resolve()  # which may be reached by a link
        if name := named_checkpoint(label.parent, label.name):
            return Checkpoint(label.parent / name)
    good = newest_good(path / "checkpoints") or newest_good(path)
    return good or (Checkpoint(path) if (path / SUMS_FILE).exists() else None)
