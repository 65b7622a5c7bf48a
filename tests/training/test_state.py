"""The run directory: what cannot be written in it is one line that says what to do; a run that failed gives it back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from test_train import in_corpus, train

from nib.common.exits import RunError
from nib.common.signals import STOP_SIGNALS
from nib.formats.checkpoint import list_checkpoints
from nib.tokenizer.tokenizer import ByteTokenizer
from nib.training import saving, step
from nib.training.report import Reporter
from nib.training.saving import Saver

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "log.txt"])
def test_a_file_of_the_run_that_cannot_be_written_is_one_line(name: str) -> None:
    Path("out/run", name).mkdir(parents=True)
    with pytest.raises(RunError, match=rf"cannot write to out/run/{name}: Is a directory. Make it a writable file"):
        train("--max_iters=1")


def test_a_run_that_failed_holds_nothing_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook keeps the error, and with it every frame: neither the directory nor Ctrl-C stays taken."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="my bug") as found:
        patch.setattr(step, "optimizer_step", lambda *_, **__: int("my bug"))
        train("--max_iters=2")
    assert found.tb.tb_next is not None
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert train("--max_iters=2") == 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_the_lock_is_held_while_a_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes the directory removes half a checkpoint."""
    real, taken = saving.write_checkpoint, []

    def write(checkpoints: Path, *rest: Any) -> Path:
        time.sleep(1)
        with (checkpoints.parent / ".lock").open("a+") as other, contextlib.suppress(BlockingIOError):
            taken.append(fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB))
        return real(checkpoints, *rest)

    def fail(*_: object, **known: object) -> None:
        if known["step"] == 2:
            raise ValueError("my bug")

    monkeypatch.setattr(saving, "write_checkpoint", write)
    monkeypatch.setattr(Reporter, "metrics", fail)
    with pytest.raises(ValueError, match="my bug"):
        train("--max_iters=3", "--checkpoint_interval=1", "--log_interval=1")
    assert not taken and [path.name for path in list_checkpoints(Path("out/run/checkpoints"))] == ["step-00000001"]


def test_a_checkpoint_that_cannot_be_written_says_what_there_is_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(saving, "write_checkpoint", refuse)
    saver = Saver(tmp_path, 2, ByteTokenizer())
    (tmp_path / "checkpoints").mkdir()
    for latest, said in (("", "there is no checkpoint before it"), ("step-00000004", "before it, step-00000004, is")):
        (tmp_path / "checkpoints/latest").write_text(latest)
        saver.save({}, {}, {}, False)
        with pytest.raises(RunError, match=said):
            saver.finish()


def test_a_checkpoint_that_counts_more_than_ours_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of before had progress["skipped_steps"]."""
    real = saving.write_checkpoint

    def write(checkpoints: Path, weights: Any, optimizer: Any, state: dict[str, Any], *rest: Any) -> Path:
        state["progress"]["skipped_steps"] = 3
        return real(checkpoints, weights, optimizer, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "write_checkpoint", write)
        train("--max_iters=1")
    assert train("--max_iters=2") == 0
