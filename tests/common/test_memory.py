"""Too much for the memory is one line that says what to lower, whatever runs out of it, and other errors are not."""

from __future__ import annotations

import functools
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Call
from model_helpers import random_model
from test_export import save_run

import evaluate as evaluate_script
import sample as sample_script
from nib.common.exits import RunError, memory_errors
from nib.data.workers import Worker

LACKS: list[Callable[[], object]] = [
    lambda: bytearray(2**62),
    lambda: torch.empty(2**62, dtype=torch.uint8),
    lambda: torch.empty(2**40, 2**40),
    lambda: torch.zeros(1).expand(2**60).clone(),
]


@pytest.mark.parametrize("lack", LACKS)
def test_what_lacks_memory_is_one_line(lack: Callable[[], object]) -> None:
    with pytest.raises(RunError, match=r"^there is not enough memory\. Lower it$"), memory_errors("Lower it"):
        lack()


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), NotImplementedError("a bug")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as found, memory_errors("Lower it"):
        raise error
    assert found.value is error


@pytest.mark.parametrize(
    "options",
    [
        ["--num-samples=1e15"],
        ["--num-samples=9e18", "--no-cache"],
        ["--num-samples=1e12", "--max-new-tokens=1e18", "--json"],
        ["--num-samples=1e12", "--quantize=int8"],
        ["--num-samples=1e12", "--interactive"],
    ],
)
def test_more_samples_than_memory_are_refused_at_once(call: Call, options: list[str], tmp_path: Path) -> None:
    save_run(tmp_path / "out/a", random_model(vocab_size=257))
    done = call(lambda: sample_script.main(["a", *options]), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: there is not enough memory. Lower --num-samples")


def test_a_prompt_larger_than_memory_is_said(call: Call, tmp_path: Path) -> None:
    with (tmp_path / "huge").open("w") as file:
        os.truncate(file.fileno(), 2**43)
    done = call(lambda: sample_script.main(["a", "--prompt=FILE:huge"]), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr == (
        "error: the prompt in huge does not fit into memory. Give a shorter one\n"
    )


@pytest.fixture
def little_memory() -> Iterator[None]:
    """This process may take 50 MB more than it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (has + 5 * 10**7, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_more_windows_than_memory_are_said(call: Call, tmp_path: Path, little_memory: None) -> None:
    save_run(tmp_path / "out/a", random_model(vocab_size=257))
    (tmp_path / "notes.txt").write_text("a text of some length\n" * 1000)
    done = call(evaluate_script.main, "a", "--data=notes.txt", "--batch-size=1e6", "--stride=1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: there is not enough memory. Lower --batch-size or --context, or use a smaller model\n"
    )


def test_a_worker_without_memory_leaves_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match="perhaps out of memory"):
        Worker(functools.partial, bytearray)(2**62)
    assert capfd.readouterr().err == ""
