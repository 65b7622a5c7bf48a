"""What a run reports: a progress bar, metrics.jsonl, log.txt, and wandb if asked."""

from __future__ import annotations

import contextlib
import errno
import inspect
import itertools
import json
import math
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nib.common.exits import RunError
from nib.common.files import write_whole
from nib.common.wording import amount, typed
from nib.formats.checkpoint import list_checkpoints, named_checkpoint
from nib.training.settings import TrainSettings
from nib.training.state import Progress

BY_TOKENS = ("loss", "val_loss", "val_bits_per_byte")  # in wandb also plotted over tokens
QUIET_SECONDS = 10.0  # between progress lines if the output is not a terminal


class Reporter:
    """Reports one run; on every process but the first it is silent and writes nothing."""

    def __init__(self, out_dir: Path, active: bool, record: bool = True) -> None:
        """Without `record` nothing is written: another run may be at work in the directory."""
        self.out_dir, self.active, self.record = out_dir, active, record
        self.bar: tqdm[Any] | None = None
        self.wandb: Any = None
        self.samples: list[list[Any]] = []  # for wandb's table: step and text
        self.last_line = time.monotonic()

    def resume_metrics(self, step: int) -> None:
        """Remove the lines of metrics.jsonl after `step`: the resumed run writes them again."""
        path = self.out_dir / "metrics.jsonl"
        if not self.active or not path.exists():
            return
        with self.writing("metrics.jsonl"):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue  # a line truncated when the run was killed
        self.write("metrics.jsonl", "".join(kept))

    def write(self, name: str, text: str) -> None:
        """Write `text` to a file, atomically."""
        if self.active:
            with self.writing(name):
                write_whole(self.out_dir / name, text.encode("utf-8"))

    def say(self, text: str) -> None:
        """Print a line, and append it to log.txt."""
        if not self.active:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)
        self.append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def append(self, name: str, text: str) -> None:
        if self.record:
            path = self.out_dir / name
            with self.writing(name), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Turn OSErrors of the body into a RunError: a run that cannot be recorded ends."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            how = "Make room" if full else "Make it a writable file, or move it away"
            reason = f"cannot write to {self.out_dir / name}: {error.strerror}"
            raise RunError(f"{reason}. {how}, and run the same command again to resume") from None

    def start_bar(self, step: int, steps: int, max_seconds: float) -> None:
        """Start the progress bar, over steps, or over seconds if only max_seconds ends the run."""
        self.steps, self.max_seconds = steps, max_seconds
        if self.active and sys.stderr.isatty():
            unit, total = ("step", steps) if steps else ("second", max_seconds)
            shape = "{percentage:3.0f}% {bar} {unit} {n:.0f}/{total:.0f} [{elapsed}, {remaining} left{postfix}]"
            self.bar = tqdm(total=total, initial=step if steps else 0, unit=unit, bar_format=shape, dynamic_ncols=True)

    def progress(self, done: Progress, epoch: float, loss: float, rate: float, mfu: float) -> None:
        """Update the bar, or without a bar print a line every QUIET_SECONDS. Called at every step."""
        text = f"epoch {epoch:.2f}, loss {loss:.3f}"
        text += f", {amount(rate)} tokens/s" if rate else ""  # known after the first log_interval
        text += f", MFU {100 * mfu:.0f} %" if mfu else ""
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update((done.step if self.steps else min(done.seconds, self.max_seconds)) - self.bar.n)
        elif self.active and time.monotonic() - self.last_line >= QUIET_SECONDS:
            self.last_line = time.monotonic()
            of = f"/{self.steps}" if self.steps else ""
            print(f"step {done.step}{of}: {text}, {done.seconds:.0f} s", flush=True)

    def metrics(self, **values: float) -> None:
        """Append a line to metrics.jsonl, and log the same to wandb."""
        if not self.active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        self.append("metrics.jsonl", json.dumps(finite) + "\n")
        by_tokens = {f"by_tokens/{name}": values[name] for name in BY_TOKENS if name in values}
        self.to_wandb({**values, **by_tokens}, int(values["step"]))

    def sample(self, step: int, text: str) -> None:
        """Print a sample of the current model, and add it to wandb's table of samples."""
        self.say(f"--- sample ---\n{text}\n--- end of sample ---")
        if self.wandb is not None:
            import wandb

            self.samples.append([step, text])
            self.to_wandb({"samples": wandb.Table(["step", "text"], data=self.samples)}, step)

    def to_wandb(self, values: dict[str, Any], step: int) -> None:
        if self.wandb is None:
            return
        try:
            self.wandb.log(values, step=step)
        except Exception as error:  # wandb raises many kinds; none may end a training run
            self.wandb = None
            self.say(f"warning: wandb failed, so nothing more is logged there: {' '.join(str(error).split())}")

    def start_wandb(self, project: str, name: str, config: dict[str, Any]) -> None:
        """Log to wandb too. A resumed run keeps its id; without a login, data is kept offline for `wandb sync`.

        An error of wandb is a warning: it never ends a run.
        """
        if not self.active:
            return
        path = self.out_dir / "wandb_id.txt"
        try:
            import wandb

            if not path.exists():
                path.write_text(secrets.token_hex(4))
            mode: Any = None if os.environ.get("WANDB_MODE") or logged_in(wandb) else "offline"
            self.wandb = wandb.init(
                project=project, name=name, config=config, id=path.read_text(), resume="allow", dir=self.out_dir,
                mode=mode,
            )  # fmt: skip
            self.wandb.define_metric("tokens", hidden=True)
            self.wandb.define_metric("by_tokens/*", step_metric="tokens")
            if mode:
                kept = f"{typed(self.out_dir)}/wandb/offline-run-*"
                self.say(f"wandb: no login, so the run is kept offline. Later: wandb sync {kept}")
        except ImportError:
            self.say("warning: wandb is not installed, so nothing is logged there. pip install wandb")
        except Exception as error:  # wandb raises many kinds; none may end a training run
            self.say(f"warning: wandb did not start, so nothing is logged there: {' '.join(str(error).split())}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.wandb is not None:
            with contextlib.suppress(Exception):
                self.wandb.finish()


def logged_in(wandb: Any) -> bool:
    """Whether wandb has an API key, checked without prompting the user: a run must not wait for input."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False))
    return bool(wandb.api.api_key)  # older versions of wandb


def command_line() -> str:
    """The command that started this process, as a user would type it."""
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
        launcher = f"torchrun --standalone --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"
        if nodes > 1:
            launcher = f"torchrun --nnodes={nodes} --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', '1')} ..."
    return " ".join([launcher, *map(shlex.quote, sys.argv)])


def way_back(settings: TrainSettings, progress: Progress) -> str:
    """For a run that diverged: its newest checkpoint, and a command that starts a new run with lower learning rates.

    The new run starts from the best checkpoint, else from the newest one before the last update that was not skipped,
    since later weights gave only values that are not finite. Without either, it starts where this run did.
    """
    checkpoints = Path(settings.out_dir) / "checkpoints"
    last_update = progress.step - progress.skipped_in_a_row
    older = [path.name for path in list_checkpoints(checkpoints) if int(path.name[5:]) < last_update]
    source = named_checkpoint(checkpoints, "best") or next(iter(older), "")
    out_dir = Path(settings.out_dir)
    named = out_dir if out_dir.name not in ("", "..") else out_dir.resolve()  # Path(".") has no name
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
