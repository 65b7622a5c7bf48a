"""Losses, gradients and weights that are not finite: what is skipped, what is saved, and the way back."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import HAS_FSDP, ROOT
from test_train import TINY, in_corpus, losses, metrics, tensors, train

import train as train_script
from model import GPT
from nib.common.exits import RunError
from nib.common.options import Parsed
from nib.training import step
from nib.training.run import Run
from nib.training.settings import TrainSettings

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/

FILES = ("model.safetensors", "optimizer.safetensors")


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """In these steps, counted from 1, one element of the embedding's gradient is infinite; the loss is not."""
    real = step.optimizer_step

    def spoiled(run: Run, *batch: torch.Tensor) -> tuple[float, float]:
        weight = next(run.ready.parameters())
        hook = weight.register_hook(lambda grad: grad.clone().index_fill_(0, torch.tensor(5), torch.inf))
        if run.progress.step + 1 not in steps:
            hook.remove()
        result = real(run, *batch)
        hook.remove()
        return result

    monkeypatch.setattr(step, "optimizer_step", spoiled)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, calls: set[int]) -> None:
    """The loss is NaN in these forward passes, counted from 1, of a run whose trial pass is the first."""
    count, real = [0], GPT.loss

    def loss(self: GPT, *rest: torch.Tensor) -> torch.Tensor:
        count[0] += torch.is_grad_enabled()
        return real(self, *rest) * (torch.nan if count[0] - 1 in calls and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(GPT, "loss", loss)


def state_of(run: str) -> dict[str, Any]:
    name = Path(run, "checkpoints/latest").read_text().strip()
    found: dict[str, Any] = json.loads(Path(run, "checkpoints", name, "state.json").read_text())
    return found


def skipped(run: str) -> int:
    return Path(run, "log.txt").read_text().count("is skipped: ")


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_infinite_gradient_skips_every_optimizer(
    monkeypatch: pytest.MonkeyPatch, dtype: str, optimizer: str
) -> None:
    """Nothing at all moves: weights, momentum, second moments and step counts are those before the step."""
    settings = [f"--dtype={dtype}", f"--optimizer={optimizer}", "--schedule=constant"]
    train(*settings, "--max_iters=2")
    before, scale = [tensors("out/run", file) for file in FILES], state_of("out/run")["scaler"]
    spoil_gradients(monkeypatch, {3})
    train(*settings, "--max_iters=3")
    assert skipped("out/run") == 1 and losses()[-1] > 0
    for old, new in zip(before, [tensors("out/run", file) for file in FILES], strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    if dtype == "float16":
        assert state_of("out/run")["scaler"]["scale"] == scale["scale"] / 2
    train(*settings, "--max_iters=4")
    assert not any(torch.equal(value, before[0][name]) for name, value in tensors("out/run").items() if "qkv" in name)


@pytest.mark.parametrize("end", ["budget", "signal", "too many skipped"])
def test_a_skipped_last_step_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    train("--max_iters=4", "--schedule=constant", "--out_dir=out/sane")
    spoil_gradients(monkeypatch, {5})
    if end == "budget":
        assert train("--max_iters=5", "--schedule=constant") == 0
        assert "done: step 5" in capsys.readouterr().out
    elif end == "signal":
        spoiled = step.optimizer_step

        def stopped(run: Run, *batch: torch.Tensor) -> tuple[float, float]:
            if run.progress.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return spoiled(run, *batch)

        monkeypatch.setattr(step, "optimizer_step", stopped)
        assert train("--schedule=constant") == 143
        assert "stopped at step 5, which is saved." in capsys.readouterr().out
    else:
        with pytest.raises(RunError, match=r"The newest checkpoint is out/run/checkpoints/step-00000005"):
            train("--schedule=constant", "--max_skipped_steps=1")
    for file in FILES:
        expected = tensors("out/sane", file)
        assert all(torch.equal(expected[name], value) for name, value in tensors("out/run", file).items())
    progress = state_of("out/run")["progress"]
    assert progress["step"] == 5 and progress["skipped_in_a_row"] == 1 and progress["tokens"] == 5 * 256


def test_skipped_steps_push_no_checkpoint_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a save could write again is the weights that are saved already."""
    spoil_loss(monkeypatch, set(range(5, 12)))
    train("--max_iters=10", "--checkpoint_interval=2", "--keep_checkpoints=2")
    assert sorted(path.name for path in Path("out/run/checkpoints").glob("step*")) == ["step-00000004", "step-00000010"]
    assert state_of("out/run")["progress"]["skipped_in_a_row"] == 6


def test_a_run_whose_end_is_not_saved_does_not_say_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = step.optimizer_step

    def poison(run: Run, *batch: torch.Tensor) -> tuple[float, float]:
        result = real(run, *batch)
        with torch.no_grad():
            next(run.ready.parameters())[0, 0] = torch.inf
        return result

    monkeypatch.setattr(step, "optimizer_step", poison)
    with pytest.raises(RunError, match=r"the run's end, step 2, is not saved\. There is no checkpoint"):
        train("--max_iters=2")
    assert "done" not in capsys.readouterr().out


@pytest.mark.parametrize("checkpoints", ["--eval_interval=3", "--checkpoint_interval=2", "--checkpoint_interval=0"])
def test_the_advice_after_nan_works_as_it_is_typed(monkeypatch: pytest.MonkeyPatch, checkpoints: str) -> None:
    """From the best checkpoint, from one whose next step was finite, or where there is none from the beginning."""
    out, rates = "--out_dir=out/my run", ["--learning_rate=5e-2", "--min_lr=4e-2", "--muon_learning_rate=0.1"]
    arguments = [out, *rates, "--max_iters=10", "--max_skipped_steps=2", "--n_kv_head=0", checkpoints]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *arguments])
    with monkeypatch.context() as spoiled, pytest.raises(RunError) as found:
        spoil_loss(spoiled, set(range(5, 20)))
        train(*arguments)
    source = {"--eval_interval=3": 3, "--checkpoint_interval=2": 2}.get(checkpoints)
    command = re.search(r"lower learning rate: python (.*)$", str(found.value))
    assert command is not None, found.value
    words = shlex.split(command[1])
    assert [word for word in words if word.startswith("--init_from")] == (
        [f"--init_from=out/my run/checkpoints/step-{source:08d}"] if source else []
    )
    parsed: Parsed[TrainSettings] = train_script.read_settings(words[1:])
    settings = parsed.settings
    assert settings.learning_rate == 1e-3 and settings.muon_learning_rate == 0.01 and settings.min_lr == 8e-4
    assert train_script.train(parsed) == 0
    assert len(losses("out/my run-2")) == 10
    if source:
        assert losses("out/my run-2")[0] < losses("out/my run")[0]


@pytest.mark.parametrize(("place", "out"), [("mine", "."), ("mine/inside", ".."), ("mine", "inside/..")])
def test_the_advice_names_a_directory_beside_one_without_a_name(
    place: str, out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mine/inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / place)
    with monkeypatch.context() as spoiled, pytest.raises(RunError) as found:
        spoil_loss(spoiled, set(range(1, 20)))
        dataset = f"--dataset={tmp_path / 'data/words'}"
        train(f"--out_dir={out}", dataset, "--max_iters=3", "--max_skipped_steps=2")
    assert f"--out_dir={tmp_path / 'mine-2'}" in shlex.split(str(found.value))


SPOILED = """
import sys
import torch, torch.distributed as dist
import train
import nib.training.run, nib.training.step
from nib.common.exits import leave
real, scaler = nib.training.step.optimizer_step, torch.amp.GradScaler
unscale, now = scaler.unscale_, [0]

def spoil(self, optimizer):
    unscale(self, optimizer)
    if now[0] == 1 and dist.get_rank() == 1:
        grad = optimizer.param_groups[0]["params"][0].grad
        getattr(grad, "_local_tensor", grad)[0] = torch.inf

def step(run, *batch):
    now[0] = run.progress.step
    return real(run, *batch)

scaler.unscale_, nib.training.step.optimizer_step = spoil, step
made = nib.training.run.Run.__init__

def init(self, *arguments):  # one of the two as on GPUs, which nobody waits for
    made(self, *arguments)
    self.queued = self.settings.parallel == "fsdp"

nib.training.run.Run.__init__ = init
for options in ("--parallel=fsdp --dtype=bfloat16 --sample_interval=2", "--dtype=float16 --muon_momentum=0.9"):
    if "fsdp" in options and not hasattr(torch.cpu.Stream, "record_event"):
        continue  # torch 2.6 has no FSDP for CPUs
    arguments = [*sys.argv[1:], *options.split(), "--out_dir=out/" + options[2:5]]
    assert train.train(train.read_settings(arguments)) == 0
    dist.destroy_process_group()
leave(0)
"""


def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(tmp_path: Path) -> None:
    """Sharded in bfloat16, which also samples while it trains, and float16 with its loss scale."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment = {**os.environ, **place, "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SPOILED, *TINY, "--max_iters=3"], cwd=tmp_path,
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    runs = sorted(path.name for path in Path("out").iterdir())
    assert runs == (["dty", "par"] if HAS_FSDP else ["dty"])
    assert said[0].count("warning: step 2 is skipped") == len(runs), said
    for run in runs:
        assert [line["grad_norm"] is None for line in metrics(f"out/{run}")] == [False, True, False]
        assert skipped(f"out/{run}") == 1
        assert all(value.isfinite().all() for file in FILES for value in tensors(f"out/{run}", file).values())
