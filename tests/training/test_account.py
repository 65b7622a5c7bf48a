"""train.py --dry-run: its counts against torch's, its memory against a process's, and that it writes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from model_helpers import GPT2, LLAMA, random_model, random_tokens
from test_train import in_corpus, train
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from nib.common.exits import InputError
from nib.formats.checkpoint import list_checkpoints
from nib.training.account import LiveBytes, lines, memory_of_step
from nib.training.cost import flops_by_part, num_parameters, parameters_by_part
from nib.training.distributed import Cluster
from nib.training.saving import lock_run
from nib.training.settings import TrainSettings

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2, "llama": LLAMA, "grouped": {**LLAMA, "n_kv_head": 2, "mlp_hidden": 48}, "wide": {"head_size": 24},
    "untied": {"tie_weights": False, "position": "sinusoidal"},
}  # fmt: skip
MEASURE = """
import sys
sys.path[:0] = ["bench", "."]
from account import arguments_of, measured
from nib.training.account import memory_of_step
print(measured("small")(), memory_of_step(*arguments_of("small"))["peak"])
"""


def account(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert train("--dry-run", "--json", *arguments) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.fixture(autouse=True)
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nib.training.account.TRIAL_SECONDS", 0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_logits", [GPT.max_logits, 40 * 7], ids=["whole", "chunked"])
def test_flops_are_those_that_torch_counts(shape: str, max_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With attention in plain products: torch's counter does not know the fused kernel of the CPU."""
    monkeypatch.setattr(GPT, "max_logits", max_logits)
    model, (B, T) = random_model(**SHAPES[shape]), (3, 16)
    tokens = random_tokens(B, T)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, tokens)[1].backward()
    assert counter.get_total_flops() == B * T * sum(flops_by_part(model, T).values())


@pytest.mark.parametrize("shape", SHAPES)
def test_parts_add_up(shape: str) -> None:
    model = random_model(**SHAPES[shape])
    parts = parameters_by_part(model)
    assert sum(parts.values()) == num_parameters(model) and "rest" not in parts
    assert parts["embeddings"] == sum(
        each.numel() for name, each in model.named_parameters() if name[:2] in ("wt", "wp")
    )
    assert ("head" in parts) == (not model.config.tie_weights)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"dtype": "bfloat16"}])
def test_fake_tensors_take_the_memory_of_real_ones(optimizer: str, options: dict[str, Any]) -> None:
    """The same step on real tensors, counted in the same way: kernels allocate what their fakes do."""
    from nib.common.device import Precision

    settings = TrainSettings(block_size=32, batch_size=4, optimizer=optimizer, **options)
    config, cluster = GPTConfig(vocab_size=100, block_size=32, n_layer=2, n_head=2, n_embd=32), cpu()
    found = memory_of_step(lambda: GPT(config), settings, cluster, 4)
    with LiveBytes() as live:
        model = GPT(config)
        model.activation_checkpointing = settings.activation_checkpointing
        tokens, before = torch.zeros(2, 4, 32, dtype=torch.int64), live.now
        with Precision(settings.dtype, cluster.device).autocast():
            _, loss = model(*tokens)
        activations = live.now - before
        loss.backward()
    assert found["weights"] == sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
    assert abs(found["activations"] / activations - 1) < 0.02  # some fakes align otherwise
    kinds = {"adamw": {"exp_avg", "exp_avg_sq"}, "muon": {"exp_avg", "exp_avg_sq", "momentum_buffer"}}
    assert set(found["optimizer"]) == kinds[optimizer]


def cpu() -> Cluster:
    return Cluster(0, 1, torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_what_a_process_takes() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    took, said = map(int, done.stdout.split())
    assert abs(said / took - 1) < 0.15, f"{said / 1e6:.1f} MB said, {took / 1e6:.1f} MB taken"


def test_the_account_agrees_with_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    found = account(capsys, "--max_iters=4", "--micro_batch_size=4")
    assert not Path("out").exists() and found["trial"]["tokens_per_second"] > 0
    assert found["run"]["steps"] == 4 and found["run"]["tokens"] == 4 * 8 * 32 and found["micro_batch_size"] == 4
    assert train("--max_iters=4") == 0
    assert f"{found['flops_per_token']['total'] / 1e6:.1f} MFLOP a token" in capsys.readouterr().out
    (checkpoint,) = list_checkpoints(Path("out/run/checkpoints"))
    written = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.safetensors"))
    assert 0 < written - found["checkpoint_bytes"] < 10_000  # the names in the files' heads
    model = random_model(vocab_size=257)
    assert account(capsys, "--n_head=4", "--n_kv_head=1")["cache"]["bytes_per_token"] == 2 * 2 * 8 * 4
    assert model.make_cache(1, 1).memory.nbytes == 2 * 2 * 32 * 4


def test_it_works_beside_a_run_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    train("--max_iters=2")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    with lock_run(Path("out/run")):
        before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
        first = account(capsys, "--n_layer=3")
        tuned = account(capsys, "--init_from=out/run", "--block_size=16")
    assert before == {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    assert first["parameters"]["attention"] == 3 * 4 * 32 * 32
    assert tuned["cache"]["tokens"] == 32 and tuned["run"]["tokens"] == 20 * 8 * 16


def test_what_does_not_fit_is_accounted_for_and_not_tried(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nib.training.account.free_memory", lambda device: 1000)
    found = account(capsys)
    assert found["trial"] is None and found["memory"]["peak"] > 1000 and found["micro_batch_size"] == 1
    assert "does not fit" in lines(found)[-1]


def test_a_large_corpus_is_not_loaded_to_account_for_a_run_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    found = account(capsys, "--dataset=openwebtext", "--batch_size=2")
    assert found["parameters"]["embeddings"] == 50257 * 32 and found["run"]["epochs"] is None
    assert not Path("data/openwebtext").exists()


def test_json_without_dry_run_is_an_error() -> None:
    with pytest.raises(InputError, match="json is an option of dry_run"):
        train("--json")
