"""--eval_only beside a run at work: it waits for nothing, disturbs nothing, and what it reads is whole."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_train import TINY, in_corpus, metrics, train

from nib.formats import checkpoint
from nib.formats.checkpoint import Checkpoint, list_checkpoints, remove_old
from nib.training import objective

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/


def everything(run: Path) -> dict[str, tuple[int, bytes]]:
    """Each file and directory with when it was last changed and what is in it."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [run, *run.rglob("*")]
    }


def test_eval_only_writes_nothing_and_finds_what_the_run_found(capsys: pytest.CaptureFixture[str]) -> None:
    train("--max_iters=4", "--checkpoint_interval=2")
    (Path("out/run/checkpoints/latest")).write_text("step-00000002\n")  # as a kill leaves it
    (Path("out/run/checkpoints/.step-00000006.partial")).mkdir()  # as a run at work has it
    before = everything(Path("out/run"))
    capsys.readouterr()
    assert train("--max_iters=4", "--eval_only") == 0
    assert everything(Path("out/run")) == before
    said = capsys.readouterr().out
    assert f"step 4: validation loss {metrics()[-1]['val_loss']:.4f}" in said
    assert train("--init_from=out/run", "--eval_only", "--out_dir=out/none") == 0 and not Path("out/none").exists()


def test_a_run_at_work_is_validated(capsys: pytest.CaptureFixture[str]) -> None:
    """The run saves at every step and keeps one checkpoint; each time a whole one is read, without a warning."""
    work = ["--max_iters=100000", "--schedule=constant", "--checkpoint_interval=1", "--keep_checkpoints=1"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *work, "--log_interval=1000"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            step = 0
            for _ in range(6):
                while process.poll() is None and newest() <= step:
                    time.sleep(0.01)
                assert train(*work, "--eval_only", "--eval_tokens=500") == 0
                said = capsys.readouterr()
                found = re.fullmatch(r"step (\d+): validation loss \d.*\n", said.out)
                assert found and int(found[1]) > step and said.err == "", said
                step = int(found[1])
            assert process.poll() is None, process.stderr and process.stderr.read()
        finally:
            process.kill()


def newest() -> int:
    return max((int(path.name[5:]) for path in list_checkpoints(Path("out/run/checkpoints"))), default=0)


def test_a_checkpoint_that_is_being_read_is_not_removed_as_an_old_one() -> None:
    train("--max_iters=3", "--checkpoint_interval=1", "--keep_checkpoints=0")
    checkpoints = Path("out/run/checkpoints")
    reader = Checkpoint(checkpoints / "step-00000001")
    (checkpoints / "best").unlink()
    remove_old(checkpoints, 1, "step-00000003")
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-00000003", "step-00000001"]
    assert reader.weights() and reader.tokenizer()
    reader.release()
    remove_old(checkpoints, 1, "step-00000003")
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-00000003"]


def test_a_checkpoint_that_goes_while_it_is_opened_is_not_called_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--max_iters=2", "--checkpoint_interval=1")
    listed = [[Path("out/run/checkpoints/step-00000000")]]  # as it was a moment ago
    real = checkpoint.list_checkpoints
    monkeypatch.setattr(checkpoint, "list_checkpoints", lambda place: listed.pop() if listed else real(place))
    found = checkpoint.newest_good(Path("out/run/checkpoints"))
    assert found is not None and found.state["step"] == 2 and capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_validation_at_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--max_iters=1")

    def validating(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(objective, "validate", validating)
    if (child := os.fork()) == 0:
        signal.signal(number, signal.SIG_DFL)  # SIGHUP is ignored where the tests run under nohup
        try:
            train("--max_iters=1", "--eval_only")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
