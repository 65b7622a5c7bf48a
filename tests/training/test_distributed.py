"""Several processes, one of which is gone or has a bug: each says what it knows, and none waits for ever."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT
from test_train import TINY, in_corpus

from nib.common.exits import RunError
from nib.training.distributed import lost_processes

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/

GONE = [
    dist.DistError("they did not come"),
    dist.DistBackendError("NCCL error: remote process exited or there was a network error"),
    dist.DistNetworkError("the connection was reset"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:4\nmore"),
    RuntimeError("Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:144] no error"),
]
BUGS = [RuntimeError("a bug"), RuntimeError("my gloo/layer.cc fails"), ValueError("[gloo/pair.cc:5] no RuntimeError")]


@pytest.mark.parametrize("error", GONE, ids=lambda error: str(error)[:20])
def test_a_process_that_is_gone_is_one_line_and_a_way_on(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RunError, match=r"^process 1 lost the others: .*The same command") as found, lost_processes():
        raise error
    assert "\n" not in str(found.value) and found.value.__suppress_context__


@pytest.mark.parametrize(("world", "error"), [*(("2", bug) for bug in BUGS), *(("1", error) for error in GONE)])
def test_a_bug_stays_what_it_is(world: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(type(error)) as found, lost_processes():
        raise error
    assert found.value is error


# What a user adds at the end of model.py.
CHANGE = """

import os
calls, changed = [], GPT.{method}

class MyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("my bug")

def my_change(self, *arguments, **options):
    result = changed(self, *arguments, **options)
    calls.append(1)
    if len(calls) > {calls} and ({both} or os.environ["RANK"] == "1"):
        {what}
    return result

GPT.{method} = my_change
"""


def start(directory: Path, *arguments: str, redirect: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    shell = ["bash", "-c", f'exec "$@" {redirect}', "bash", *command, str(directory / "train.py"), *TINY, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=100)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """nib as a user has it who changes model.py."""
    shutil.copytree(ROOT / "nib", tmp_path / "copy/nib", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "model.py"):
        shutil.copy(ROOT / name, tmp_path / "copy" / name)
    return tmp_path / "copy"


def change(copy: Path, method: str, who: str, calls: int = 0) -> None:
    what = 'raise RuntimeError("my bug")'
    if method == "backward":
        method, what = "forward", "return result[0], MyBackward.apply(result[1])"
    with (copy / "model.py").open("a") as file:
        file.write(CHANGE.format(method=method, both=who == "both", calls=calls, what=what))


@pytest.mark.parametrize(
    ("method", "who", "calls"),
    [("__init__", "both", 0), ("forward", "one", 0), ("forward", "one", 6), ("backward", "both", 0)],
)
def test_a_bug_in_the_model_of_several_processes_ends_in_its_whole_traceback(
    method: str, who: str, calls: int, copy: Path
) -> None:
    change(copy, method, who, calls)
    done = start(copy, "--max_iters=20")
    assert done.returncode != 0
    told = [rank for rank in "01" if f"[rank{rank}]: RuntimeError: my bug" in done.stderr]
    assert told if who == "both" else told == ["1"], done.stderr  # of both torchrun may end the second first
    assert re.search(rf'File "{re.escape(str(copy))}/model.py", line \d+, in ', done.stderr), done.stderr


def test_a_bug_with_closed_streams_is_no_success_of_several_processes(copy: Path) -> None:
    change(copy, "forward", "both")
    assert start(copy, "--max_iters=6", redirect="<&- >&- 2>&-").returncode != 0
