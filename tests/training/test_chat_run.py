"""Training on conversations and on mixtures: the loss is that of the learned tokens, whoever computes it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_data import Conversation, conversation, sums, write_chats
from conftest import ROOT
from test_train import losses, metrics, tensors

import evaluate as evaluate_script
import prepare_data as prepare_script
import train as train_script
from model import GPT, GPTConfig
from nib.common.exits import InputError
from nib.data.dataset import Dataset
from nib.data.sequences import Conversations
from nib.training import run as run_module

TRAIN, VAL = sums(60), sums(20, first=60)
TINY = (
    "--dataset=chats --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=8 --max_iters=20 "
    "--warmup_iters=2 --eval_interval=0 --log_interval=1 --checkpoint_interval=0 --learning_rate=3e-3 --device=cpu"
).split()
MIXTURE = "--dataset=chats:0.25,words:0.75"


@pytest.fixture(autouse=True)
def in_data(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs where data/ has chats and words, and out/ is its own."""
    monkeypatch.chdir(tmp_path)
    write_chats(Path("data/chats"), TRAIN, VAL, shard_tokens=100)
    Path("data/words").symlink_to(corpus / "data/words")
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY])


def train(*arguments: str) -> int:
    return train_script.train(train_script.read_settings([*TINY, *arguments]))


def nats(model: Any, text: Conversation, block_size: int = 32) -> tuple[float, list[int]]:
    """The sum over one conversation's learned tokens by the formula, and these tokens."""
    ids, learned = (side[: block_size + 1] for side in text)
    with torch.no_grad():
        logits, _ = model.eval()(torch.tensor([ids[:-1]]))
    targets = [(place, right) for place, (right, counts) in enumerate(zip(ids[1:], learned[1:], strict=True)) if counts]
    log_probs = logits[0].double().log_softmax(-1)
    return -sum(float(log_probs[place, right]) for place, right in targets), [right for _, right in targets]


def untrained(monkeypatch: pytest.MonkeyPatch) -> list[GPT]:
    """The models that runs begin with, as they were then."""
    kept: list[GPT] = []
    real = run_module.Run.take

    def take(self: Any, model: GPT, *rest: Any) -> None:
        copy = GPT(model.config)
        copy.load_state_dict(model.state_dict())
        kept.append(copy)
        real(self, model, *rest)

    monkeypatch.setattr(run_module.Run, "take", take)
    return kept


def test_the_loss_of_a_batch_is_the_sum_over_single_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the micro-batches and processes. Weights are large, so that each token has a loss of its own."""
    models = untrained(monkeypatch)
    real = GPT.initialise
    monkeypatch.setattr(
        GPT, "initialise", lambda self: (real(self), *(each.data.mul_(3) for each in self.parameters()))
    )
    first = Conversations(Dataset(Path("data/chats")).train, 32, 1337).index(torch.arange(8).numpy())
    found = []
    for micro in (1, 2, 8):
        train("--max_iters=1", f"--micro_batch_size={micro}", f"--out_dir=out/{micro}")
        found.append((losses(f"out/{micro}")[0], metrics(f"out/{micro}")[0]["grad_norm"]))
    found_alone = [nats(models[0], TRAIN[number]) for number in first.tolist()]
    expected = math.fsum(loss for loss, _ in found_alone) / sum(len(learned) for _, learned in found_alone)
    assert [loss for loss, _ in found] == pytest.approx([expected] * 3, rel=1e-6)
    assert [norm for _, norm in found] == pytest.approx([found[0][1]] * 3, rel=1e-5)
    assert metrics("out/1")[0]["tokens"] == sum(len(TRAIN[number][0]) - 1 for number in first.tolist())


def test_two_processes_have_the_loss_of_one() -> None:
    settings = [*TINY, MIXTURE, "--max_iters=3", "--eval_interval=1", "--micro_batch_size=2", "--out_dir=out/two"]
    train(*settings, "--out_dir=out/one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, str(ROOT / "train.py"), *settings], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    one, two = metrics("out/one"), metrics("out/two")
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-5), ("val_loss", 1e-4), ("tokens", 0), ("epoch", 0)):
        assert two[0][key] == pytest.approx(one[0][key], rel=tolerance), key


def test_validation_is_over_learned_tokens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    train("--max_iters=1")
    model = GPT(GPTConfig(**json.loads(Path("out/run/config.json").read_text())["model_config"]))
    model.load_state_dict(tensors("out/run"))
    alone = [nats(model, text) for text in VAL]
    total, learned = math.fsum(loss for loss, _ in alone), [right for _, targets in alone for right in targets]
    last = metrics()[-1]
    assert last["val_loss"] == pytest.approx(total / len(learned), rel=1e-6)
    size = sum(right < 256 for right in learned)
    assert last["val_bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-6)
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "out/run", "--json"])
    evaluate_script.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["texts"], found["tokens"], found["bytes"]) == (len(VAL), len(learned), size)
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert found["stride"] == 0  # each conversation is one window


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_where_no_target_counts_is_done(optimizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss and gradient are 0; momentum and decay act as in any step. Nothing is skipped."""
    nothing = ([65, 66, 67, 68], [0, 0, 0, 0])
    write_chats(Path("data/mute"), [nothing] * 9, VAL)
    train("--dataset=mute", f"--optimizer={optimizer}", "--max_iters=3", "--micro_batch_size=4")
    lines = [line for line in metrics() if "loss" in line]
    assert [(line["loss"], line["grad_norm"]) for line in lines] == [(0, 0)] * 3
    assert "skipped" not in capsys.readouterr().out
    assert all(tensor.isfinite().all() for tensor in tensors("out/run").values())
    # One batch in which some count, after those in which none does.
    write_chats(Path("data/mute"), [nothing] * 15 + [conversation("a", "b")], VAL)
    train("--dataset=mute", f"--optimizer={optimizer}", "--max_iters=4", "--batch_size=4", "--out_dir=out/mixed")
    found = losses("out/mixed")
    assert sorted(found)[:3] == [0, 0, 0] and sorted(found)[3] > 1


def test_max_epochs_ends_the_run_and_the_epoch_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nib.training.report.QUIET_SECONDS", 0.0)
    train("--max_epochs=2.5", "--max_iters=0")
    lines = metrics()
    assert lines[-1]["step"] == math.ceil(2.5 * 60 / 8) == 19
    assert [line["epoch"] for line in lines] == [round(step * 8 / 60, 4) for step in range(1, 20)]
    assert lines[-1]["lr"] < 3e-4, "the schedule follows the budget"
    said = capsys.readouterr().out
    assert "19 steps, 2.53 epochs," in said and re.search(r"step 15/19: epoch 2\.00, loss \d", said)
    assert said.rstrip().endswith("python sample.py out/run"), "without --chat: the tokenizer has no chat template"
    text = Dataset(Path("data/words"))
    windows = max(1, (text.train.tokens - 32) // 32)
    train("--dataset=words", "--max_epochs=0.1", "--max_iters=0", "--out_dir=out/text")
    assert metrics("out/text")[-1]["step"] == math.ceil(windows / 10 / 8)


def test_tokens_are_a_budget_by_the_mean_length() -> None:
    train("--max_iters=0", "--max_tokens=2000")
    assert metrics()[-1]["tokens"] == pytest.approx(2000, rel=0.1)


def test_tokens_are_counted_in_the_context_of_the_model_that_is_fine_tuned() -> None:
    train("--dataset=words", "--max_iters=1", "--out_dir=out/base")
    settings = [each for each in TINY if not each.startswith("--block_size")]
    options = ["--dataset=words", "--init_from=out/base", "--max_iters=0", "--max_tokens=700", "--out_dir=out/tuned"]
    train_script.train(train_script.read_settings([*settings, *options]))
    assert [line["tokens"] for line in metrics("out/tuned")] == [256, 512, 768]


def test_a_mixture_trains_on_both_and_validates_both(capsys: pytest.CaptureFixture[str]) -> None:
    train(MIXTURE, "--eval_interval=10")
    last = metrics()[-1]
    found = [last["val_loss/chats"], last["val_loss/words"]]
    assert last["val_loss"] == pytest.approx(0.25 * found[0] + 0.75 * found[1])
    assert found[1] < 4.5 < losses()[0]
    said = capsys.readouterr().out
    assert "25.0% of the sequences: data/chats" in said
    assert f"; chats {found[0]:.4f}; words {found[1]:.4f}" in said
    capsys.readouterr()
    assert train(MIXTURE, "--eval_only") == 0 and f"; chats {found[0]:.4f}; words" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"dataset is 'chats:0\.3,words:0\.7' but .* made with 'chats:0\.25,words:0\.75'"
    ):
        train("--dataset=chats:0.3,words:0.7")
    write_chats(Path("data/chats"), TRAIN, VAL[1:])
    with pytest.raises(
        InputError, match=r"data/chats, data/words is not the corpus that the run in out/run began with"
    ):
        train(MIXTURE)
    with pytest.raises(InputError, match=r"no dataset 'poems' under data/"):
        train("--dataset=chats:0.3,poems:0.7", "--out_dir=out/other")


def test_a_mixture_may_fine_tune() -> None:
    train("--dataset=words", "--out_dir=out/base")
    assert train(MIXTURE, "--init_from=out/base", "--max_iters=2", "--out_dir=out/tuned") == 0


def test_a_run_on_text_is_fine_tuned_to_a_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its vocabulary grows by the special tokens of the template."""
    train("--dataset=words", "--max_iters=2", "--out_dir=out/base")
    rows = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(40)]
    Path("talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", "prepare_data.py talk.jsonl --format=chat --tokenizer=out/base".split())
    prepare_script.main()
    train("--dataset=talk", "--init_from=out/base", "--max_iters=0", "--out_dir=out/tuned", "--max_epochs=8")
    base, tuned = tensors("out/base")["wte.weight"], tensors("out/tuned")["wte.weight"]
    assert (len(base), len(tuned)) == (257, 261)
    assert losses("out/tuned")[-1] < losses("out/tuned")[0] - 1
    train("--dataset=talk", "--init_from=out/base", "--max_iters=0", "--out_dir=out/tuned", "--max_epochs=9")
    assert metrics("out/tuned")[-1]["step"] == 44
    assert capsys.readouterr().out.rstrip().endswith("sample from it: python sample.py out/tuned --chat")


def test_conversations_are_compiled_for_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr(
        "torch.compile", lambda *rest, **options: real(*rest, **options, backend=counter, fullgraph=True)
    )
    train("--compile", "--micro_batch_size=1", "--max_iters=12", "--out_dir=out/compiled")
    assert 2 < counter.frame_count <= 8
    train("--micro_batch_size=1", "--max_iters=12", "--out_dir=out/plain")
    assert losses("out/compiled") == pytest.approx(losses("out/plain"), rel=1e-4)
