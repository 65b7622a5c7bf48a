"""What several test files use: a tiny corpus, prepared once, and the scripts run as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Two test processes on two cores: more threads than that would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torchrun and its processes ask for the name of each address; a lost question costs 1 second instead of 5 to 10.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
# Whoever runs the tests in the background of a shell, or by nohup, has them ignore a signal, and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import torch  # noqa: E402  after the number of threads is set

HAS_FSDP = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 has none for CPUs
needs_fsdp = pytest.mark.skipif(not HAS_FSDP, reason="torch 2.6 has no FSDP for CPUs")


def run_script(script: str, *arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """`python SCRIPT ARGUMENTS` in `cwd`, as a process of its own, with its output as text."""
    options.setdefault("timeout", 120)
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [sys.executable, str(ROOT / script), *arguments], cwd=cwd, capture_output=True, text=True, **options
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="", help="where the tests marked gpu run: cuda, or cpu to see that they do")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a device, of the tests marked gpu only those run that check on a CPU what no other test does."""
    for item in items:
        marker = item.get_closest_marker("gpu")
        if marker and not marker.kwargs.get("cpu_too") and not config.getoption("--device"):
            item.add_marker(pytest.mark.skip(reason="give --device cuda"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Any:
    """The torch.device of a test that is marked gpu."""
    from nib.common.device import pick_device

    return pick_device(request.config.getoption("--device") or "cpu")


Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`run_script` for a script's `main` within this process: it saves the second that importing torch takes."""
    from nib.common import exits as errors

    def run(main: Callable[[], int | None], *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["script", *arguments])
        with pytest.raises(SystemExit) as left:
            errors.run_script(main)
        return subprocess.CompletedProcess(sys.argv, int(left.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds data/words: a small byte-level dataset of 40 documents."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "texts").mkdir()
    for number in range(40):
        lines = [f"line {line} of text {number} counts {line * number}\n" for line in range(60)]
        (root / "texts" / f"{number:02d}.txt").write_text("".join(lines))
    options = ["--out=data/words", "--tokenizer=byte", "--val-fraction=0.1", "--workers=1"]
    done = run_script("prepare_data.py", "texts", *options, cwd=root)
    assert done.returncode == 0, done.stderr
    return root
