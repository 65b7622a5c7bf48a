"""Ctrl-C and SIGHUP at the moments when they used to leave a traceback, a half-made file, or a run without its work."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from nib.formats.checkpoint import open_checkpoint

STUB = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except BaseException:
    raise ImportError("initialization failed")  # what extension modules make of any exception
"""
RUNS = {
    "train.py": ["--dataset=words"],
    "sample.py": [],
    "prepare_data.py": ["text.txt", "--tokenizer=gpt2"],
    "evaluate.py": ["run"],
    "export.py": ["run", "out"],
    "look.py": ["run", "--prompt=a"],
}


@pytest.mark.parametrize("script, module", [(script, "textwrap") for script in RUNS] + [
    ("train.py", "torch"), ("sample.py", "torch"), ("prepare_data.py", "numpy"), ("evaluate.py", "torch"),
    ("export.py", "numpy"), ("look.py", "torch"), ("prepare_data.py", "tiktoken"),
])  # fmt: skip
def test_ctrl_c_while_a_module_is_loaded_ends_without_a_word(script: str, module: str, tmp_path: Path) -> None:
    """textwrap is one of the first modules that a script loads, tiktoken is loaded when there is work to clean up."""
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "stubs").mkdir()
    (tmp_path / f"stubs/{module}.py").write_text(STUB)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "stubs")}
    command = [sys.executable, str(ROOT / script), *RUNS[script]]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
    assert not [*tmp_path.glob("data/.*")]


TWICE = """
import signal
from nib.common.signals import stop_signals_raise
with stop_signals_raise():
    try:
        signal.raise_signal(signal.SIGHUP)
    finally:
        signal.raise_signal(signal.SIGTERM)
        print("cleaned up")
"""


def test_a_second_signal_does_not_cut_the_clean_up_short() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (129, "cleaned up\n", "")


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_stops_a_run_after_saving_and_under_nohup_it_goes_on(
    corpus: Path, tmp_path: Path, nohup: bool
) -> None:
    """What a dropped connection does: SIGHUP, and from then on every write to the terminal fails."""
    (tmp_path / "data").symlink_to(corpus / "data")
    shape = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=32 --batch_size=2 --warmup_iters=1 --device=cpu".split()
    often = ["--log_interval=1", "--eval_interval=50", "--eval_tokens=100", "--checkpoint_interval=0"]
    steps = 200 if nohup else 10**6
    command = ["train.py", "--dataset=words", *shape, *often, f"--max_iters={steps}", "--out_dir=out/run"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        os.execv(sys.executable, [sys.executable, str(ROOT / command[0]), *command[1:]])
    metrics = tmp_path / "out/run/metrics.jsonl"
    try:
        end = time.monotonic() + 60
        while not metrics.exists() or metrics.stat().st_size < 1000:
            assert time.monotonic() < end and os.waitpid(pid, os.WNOHANG)[0] == 0
            time.sleep(0.01)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if nohup else 129)
    last = open_checkpoint(tmp_path / "out/run").state["step"]
    said = (tmp_path / "out/run/log.txt").read_text()
    assert last == len(metrics.read_text().splitlines()) and (last == steps) == nohup
    assert ("done: step 200" if nohup else f"stopped at step {last}, which is saved") in said
