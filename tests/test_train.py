"""train.py, run for real on a tiny byte-level corpus: what it writes, what it says, and that it learns."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from model_helpers import GPT2_124M
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

import train as train_script
from model import GPT, GPTConfig
from nib.common.device import Precision
from nib.common.exits import InputError, RunError
from nib.data.dataset import Dataset
from nib.training import step
from nib.training.account import LiveBytes
from nib.training.placement import large_enough, trial
from nib.training.report import command_line
from nib.training.run import Run

TINY = (
    "--dataset=words --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=8 --max_iters=20 "
    "--warmup_iters=2 --eval_interval=0 --log_interval=1 --checkpoint_interval=0 --learning_rate=3e-3 --device=cpu"
).split()


@pytest.fixture(autouse=True)
def in_corpus(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs where data/ is the common corpus and out/ its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(corpus / "data")
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY])


def train(*arguments: str) -> int:
    """train.py in this process: much faster than a new one, and the same from the parsed arguments on."""
    return train_script.train(train_script.read_settings([*TINY, *arguments]))


def metrics(run: str = "out/run") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def losses(run: str = "out/run") -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def tensors(run: str, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    name = Path(run, "checkpoints/latest").read_text().strip()
    return load_file(Path(run, "checkpoints", name, file))


def assert_same_run(one: str, other: str) -> None:
    """Weights, optimizer state and the loss of every step are the same to the last bit."""
    assert losses(one) == losses(other)
    for file in ("model.safetensors", "optimizer.safetensors"):
        left, right = tensors(one, file), tensors(other, file)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), f"{name} of {file} differs"


def test_the_scripts_alone_train_and_sample(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = run_script("train.py", *TINY, "--eval_interval=10", "--out_dir=out/first", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("import time:") for line in done.stderr.splitlines())
    assert "torch.optim" in done.stderr and "torch._dynamo" not in done.stderr, "the compiler takes a second to load"
    assert "sample from it: python sample.py out/first" in done.stdout
    sampled = run_script("sample.py", "--prompt=line 1", "--max-new-tokens=8", "--json", cwd=tmp_path)
    assert sampled.returncode == 0, sampled.stderr
    assert len(json.loads(sampled.stdout)["tokens"]) <= 8


def test_a_run_writes_the_files_of_the_contract_and_its_loss_falls() -> None:
    assert train("--eval_interval=10") == 0
    run = Path("out/run")
    assert {"config.json", "metrics.jsonl", "log.txt", "checkpoints"} <= {path.name for path in run.iterdir()}
    best, latest = ((run / "checkpoints" / label).read_text().strip() for label in ("best", "latest"))
    assert latest == best == "step-00000020"
    assert {path.name for path in (run / "checkpoints" / latest).iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "nib_tokenizer.json", "checksums.json",
    }  # fmt: skip
    lines = metrics()
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 21))
    keys = {"step", "epoch", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds", "memory_bytes"}
    assert all(set(line) - {"val_loss", "val_bits_per_byte"} == keys for line in steps)
    assert steps[-1]["tokens"] == 20 * 8 * 32
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    evaluations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [10, 20]
    assert json.loads((run / "config.json").read_text())["settings"]["n_embd"] == 32


def test_every_setting_of_the_contract_is_there() -> None:
    design = """out_dir seed init_from resume dataset block_size batch_size micro_batch_size n_layer n_head n_kv_head
    n_embd mlp_hidden dropout bias norm position rope_base mlp qk_norm window tie_weights optimizer learning_rate
    muon_learning_rate weight_decay beta1 beta2 grad_clip max_iters max_tokens max_seconds warmup_iters schedule
    decay_fraction min_lr eval_interval eval_tokens eval_only sample_interval checkpoint_interval checkpoint_seconds
    keep_checkpoints device dtype compile parallel activation_checkpointing log_interval wandb_log wandb_project
    wandb_run_name"""
    assert set(design.split()) <= set(vars(train_script.read_settings([]).settings))


def test_validation_loss_and_bits_per_byte_are_those_of_the_formula() -> None:
    train("--max_iters=1")
    dataset = Dataset(Path("data/words"))
    model = GPT(GPTConfig(**json.loads(Path("out/run/config.json").read_text())["model_config"]))
    model.load_state_dict(tensors("out/run"))
    tokens = torch.from_numpy(dataset.val.read(0, dataset.val.tokens))
    nats = torch.zeros((), dtype=torch.float64)
    for begin in range(0, len(tokens) - 1, 32):
        window = tokens[begin : begin + 33]
        with torch.no_grad():
            logits, _ = model.eval()(window[None, :-1])
        assert logits is not None
        nats -= logits[0].double().log_softmax(-1).gather(1, window[1:, None]).sum()
    length = torch.from_numpy(dataset.tokenizer.byte_lengths())[tokens[1:]].sum()
    found = metrics()[-1]
    assert found["val_loss"] == pytest.approx(float(nats) / (len(tokens) - 1), rel=1e-6)
    assert found["val_bits_per_byte"] == pytest.approx(float(nats) / float(length) / 0.6931471805599453, rel=1e-6)


def test_validation_draws_nothing_and_changes_nothing() -> None:
    train("--dropout=0.2", "--out_dir=out/quiet")
    train("--dropout=0.2", "--out_dir=out/busy", "--eval_interval=3", "--sample_interval=7")
    assert_same_run("out/quiet", "out/busy")


def test_micro_batches_change_the_loss_by_rounding_only() -> None:
    train("--micro_batch_size=8", "--out_dir=out/one")
    train("--micro_batch_size=2", "--out_dir=out/four")
    # 20 steps of float32 sums in another order; each step may move a loss by some units in the last place.
    assert losses("out/one") == pytest.approx(losses("out/four"), rel=1e-4)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """SIGKILL between checkpoints; the same command line resumes. Dropout, accumulation, Muon and AdamW are on."""
    settings = ["--dropout=0.1", "--micro_batch_size=2", "--max_iters=60", "--eval_interval=25"]
    train(*settings, "--out_dir=out/whole")
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY,
        *settings,
        "--checkpoint_interval=7",
        "--out_dir=out/killed",
    ]
    for survive in (10, 30):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        path = tmp_path / "out/killed/metrics.jsonl"
        while process.poll() is None and (not path.exists() or len(path.read_text().splitlines()) < survive):
            time.sleep(0.005)
        process.kill()
        process.wait()
    assert len(losses("out/killed")) < 60
    train(*settings, "--out_dir=out/killed")
    assert_same_run("out/whole", "out/killed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_tells_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=100000", "--out_dir=out/told"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "out/told/metrics.jsonl"
    while process.poll() is None and not path.exists():
        time.sleep(0.01)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number, errors
    assert re.search(r"stopped at step \d+, which is saved. Resume with: python .*train.py", output)
    assert tensors("out/told")


def test_a_finished_run_is_left_as_it_is_and_goes_on_when_its_budget_grows() -> None:
    train("--max_iters=5", "--schedule=constant", "--out_dir=out/short")
    before = tensors("out/short")
    train("--max_iters=5", "--schedule=constant", "--out_dir=out/short")
    assert all(torch.equal(before[name], value) for name, value in tensors("out/short").items())
    train("--max_iters=9", "--schedule=constant", "--out_dir=out/short")
    train("--max_iters=9", "--schedule=constant", "--out_dir=out/long")
    assert_same_run("out/long", "out/short")


def test_resuming_with_other_settings_is_refused_and_names_both_values() -> None:
    train("--max_iters=2")
    with pytest.raises(InputError, match=r"n_layer is 3 but the run in out/run was made with 2"):
        train("--n_layer=3")
    with pytest.raises(InputError, match="already holds a run"):
        train("--resume=never")
    assert train("--max_iters=3", "--micro_batch_size=4", "--log_interval=2") == 0


def test_two_runs_cannot_share_a_directory() -> None:
    from nib.training.saving import lock_run

    with lock_run(Path("out/run")), pytest.raises(InputError, match="another run is writing to"):
        train()


@pytest.mark.parametrize("budget", ["--max_tokens=2000", "--max_seconds=0.5"])
def test_a_run_ends_with_its_budget(budget: str) -> None:
    train("--max_iters=0", budget)
    last = [line for line in metrics() if "loss" in line][-1]
    if "tokens" in budget:
        assert last["step"] == 8  # 256 tokens a step
    else:
        assert 0.5 <= last["seconds"] < 5
    assert last["lr"] < 3e-4, "the schedule follows the budget, whichever it is"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_learns_what_float32_learns(dtype: str) -> None:
    train("--out_dir=out/full")
    train(f"--dtype={dtype}", "--out_dir=out/half")
    # 8 or 11 significant bits in the products, on a loss around 3.
    assert losses("out/half")[-1] == pytest.approx(losses("out/full")[-1], abs=0.05)
    state = json.loads((Path("out/half/checkpoints/step-00000020/state.json")).read_text())
    assert bool(state["scaler"]) == (dtype == "float16"), "float16's loss scale belongs to the checkpoint"


def test_options_of_the_model_all_train() -> None:
    for number, options in enumerate(
        [
            ["--position=learned", "--norm=layernorm", "--mlp=gelu", "--bias", "--no-qk_norm", "--optimizer=adamw"],
            ["--position=sinusoidal", "--mlp=relu", "--n_kv_head=1", "--schedule=wsd"],
            ["--position=none", "--mlp=relu2", "--window=8", "--schedule=linear", "--activation_checkpointing"],
            ["--mlp=gelu_tanh", "--no-tie_weights", "--schedule=constant", "--grad_clip=0"],
        ]
    ):
        assert train(*options, f"--out_dir=out/{number}") == 0
        assert losses(f"out/{number}")[-1] < losses(f"out/{number}")[0] - 0.5, options


def test_numbers_that_are_not_finite_are_skipped_and_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    train("--max_iters=3", "--out_dir=out/sane")
    good = tensors("out/sane")
    with pytest.raises(RunError, match=r"4 steps in a row, the last of them step 7\..*step-00000003"):
        monkeypatch.setattr(GPT, "loss", lambda *_: torch.tensor(float("nan"), requires_grad=True))
        train("--max_iters=50", "--max_skipped_steps=4", "--out_dir=out/sane")
    assert all(torch.equal(good[name], value) for name, value in tensors("out/sane").items())
    assert metrics("out/sane")[-1]["loss"] is None


def test_a_poisoned_model_is_not_saved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights that overflow in the very update that the checkpoint would hold: loss and gradient were still finite."""
    train("--max_iters=4", "--schedule=constant")
    real = step.optimizer_step

    def poison(run: Run, *batch: torch.Tensor) -> tuple[float, float]:
        result = real(run, *batch)
        with torch.no_grad():
            next(run.ready.parameters())[0, 0] = float("inf")
        return result

    monkeypatch.setattr(step, "optimizer_step", poison)
    with pytest.raises(RunError, match="the run's end, step 5, is not saved"):
        train("--max_iters=5", "--schedule=constant")
    assert "step 5 is not saved: its numbers are not finite" in capsys.readouterr().out
    assert Path("out/run/checkpoints/latest").read_text().strip() == "step-00000004"


def test_fine_tuning_starts_from_the_weights_of_a_run() -> None:
    train("--max_iters=30", "--out_dir=out/base")
    train("--init_from=out/base", "--max_iters=5", "--learning_rate=1e-4", "--out_dir=out/tuned", "--warmup_iters=0")
    assert losses("out/tuned")[0] == pytest.approx(losses("out/base")[-1], abs=0.3)
    train("--init_from=out/base", "--max_iters=6", "--learning_rate=1e-4", "--out_dir=out/tuned", "--warmup_iters=0")
    assert len(losses("out/tuned")) == 6, "resumed"
    with pytest.raises(InputError, match="init is 'gpt2', but the weights come from out/base"):
        train("--init_from=out/base", "--init=gpt2", "--out_dir=out/other")
    with pytest.raises(InputError, match="n_layer is 3 but out/base has 2"):
        train("--init_from=out/base", "--n_layer=3", "--out_dir=out/other")


def test_fine_tuning_takes_the_context_of_the_run_and_keeps_it_when_resumed() -> None:
    train("--max_iters=2", "--out_dir=out/base")
    settings = [each for each in TINY if not each.startswith("--block_size")]
    for steps in (2, 4):
        again = [*settings, "--init_from=out/base", f"--max_iters={steps}", "--out_dir=out/tuned"]
        assert train_script.train(train_script.read_settings(again)) == 0
    assert len(losses("out/tuned")) == 4


def test_a_compiled_run_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend=counter, fullgraph=True))
    settings = "--micro_batch_size=4 --max_iters=6 --eval_interval=2 --sample_interval=3".split()
    train(*settings, "--compile", "--out_dir=out/compiled")
    assert counter.frame_count == 1, "trial, micro-batches, validation and samples"
    train(*settings, "--out_dir=out/plain")
    assert losses("out/compiled") == pytest.approx(losses("out/plain"), rel=1e-5)


def test_a_compiler_that_fails_leaves_training_uncompiled(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_script("train.py", *TINY, "--compile", "--max_iters=2", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "warning: torch.compile failed, training goes on uncompiled" in done.stdout


def test_an_automatic_micro_batch_is_no_larger_than_pays() -> None:
    shape, sizes = GPTConfig(**GPT2_124M), [480, 240, 160, 120, 96, 80, 60, 48, 1]
    assert large_enough(sizes, 1024, shape, torch.device("cuda")) == [60, 48, 1]
    assert large_enough(sizes, 1024, shape, torch.device("cpu")) == [1]
    assert large_enough([3, 2], 2**20, shape, torch.device("cuda")) == [2], "the smallest where all are too large"


def cublas_has_no_room(size: int) -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


@pytest.mark.parametrize("allocate", [lambda size: torch.empty(size, dtype=torch.uint8), np.zeros, cublas_has_no_room])
def test_memory_that_runs_out_makes_the_micro_batch_smaller(monkeypatch: pytest.MonkeyPatch, allocate: Any) -> None:
    """The allocators' own errors, from a trial that asks for more than there is, and one that takes a GPU."""
    from nib.training import placement as fit

    monkeypatch.setattr(fit, "CPU_ACTIVATIONS", 2**40)
    real = GPT.forward

    def hungry(self: GPT, tokens: torch.Tensor, *rest: Any) -> Any:
        if len(tokens) > 4:
            allocate(2**57)
        return real(self, tokens, *rest)

    monkeypatch.setattr(GPT, "forward", hungry)
    assert train("--max_iters=1") == 0
    state = json.loads(Path("out/run/checkpoints/step-00000001/state.json").read_text())
    assert state["micro_batch_size"] == 4


@pytest.mark.parametrize("passes", [1, 2])
def test_a_trial_takes_the_memory_of_a_step_that_accumulates_gradients_or_does_not(passes: int) -> None:
    model, precision = GPT(GPTConfig(vocab_size=50, block_size=8)), Precision("float32", torch.device("cpu"))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with LiveBytes() as step:
        for _ in range(passes):
            model(tokens, tokens)[1].backward()
    model.zero_grad()
    with LiveBytes() as live:
        assert trial(model, model, 1, 8, precision, accumulates=passes > 1) is None
    assert live.peak == pytest.approx(step.peak, rel=0.01)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("size", [4, 8])
def test_a_trial_of_a_given_micro_batch_accumulates_as_the_step_does(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nib.training import placement

    asked = []

    def seen(*arguments: Any, accumulates: bool) -> Exception | None:
        asked.append(accumulates)
        return trial(*arguments, accumulates=accumulates)

    monkeypatch.setattr(placement, "trial", seen)
    assert train("--max_iters=1", "--batch_size=8", f"--micro_batch_size={size}") == 0
    assert asked == [size < 8]


def test_on_a_terminal_there_is_a_bar_with_the_time_left(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 110, 0, 0))
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--max_iters=200", "--out_dir=out/seen"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 1 << 16):
                shown += piece
        except OSError:  # the other end is closed
            pass
    assert process.returncode == 0
    assert re.search(
        rb"\d+% .*step \d+/200 \[\d\d:\d\d, \d\d:\d\d left, epoch \d\.\d+, loss \d\.\d+, [\d.]+[kM]? tokens/s\]", shown
    )


def test_the_command_to_go_on_is_quoted_for_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--out_dir=out/my run"])
    assert command_line() == "python train.py '--out_dir=out/my run'"


def torchrun(processes: int, *arguments: str, cwd: Path, redirect: str = "") -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'exec "$@" {redirect}', "bash"] if redirect else []
    command += [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [str(ROOT / "train.py"), *TINY, *arguments]
    return subprocess.run([*command, *script], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_processes_follow_one(tmp_path: Path, optimizer: str) -> None:
    settings = ["--max_iters=50", f"--optimizer={optimizer}", "--micro_batch_size=2", "--eval_interval=25"]
    train(*settings, "--out_dir=out/one")
    closed = "<&- >&- 2>&-" if optimizer == "adamw" else ""  # as under cron: no matter to several processes either
    done = torchrun(2, *settings, "--out_dir=out/two", cwd=tmp_path, redirect=closed)
    assert done.returncode == 0, done.stderr
    assert Path("out/two/log.txt").read_text().rstrip().endswith("sample from it: python sample.py out/two")
    # The same sums in another order: float32 rounding, grown over 50 steps.
    assert losses("out/two") == pytest.approx(losses("out/one"), rel=2e-3)
    assert losses("out/two")[0] == pytest.approx(losses("out/one")[0], rel=1e-6)
    assert metrics("out/two")[-1]["val_loss"] == pytest.approx(metrics("out/one")[-1]["val_loss"], rel=2e-3)


def test_one_process_does_not_wait_for_what_only_several_use() -> None:
    """FSDP and its tensors take nearly as long to import as all the rest."""
    code = 'import sys, train; sys.exit("torch.distributed.fsdp" in sys.modules)'
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_train_chooses_threads_also_without_main(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook; without it a busy machine made training ten times slower."""
    called: list[int] = []
    monkeypatch.setattr("nib.cpu.threads.choose_threads", lambda: called.append(1))
    with pytest.raises(InputError, match="no dataset 'nowhere'"):
        train("--dataset=nowhere", "--out_dir=out/x")
    assert called == [1]
