"""Preferences: the loss of the paper, the reference that is computed once, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_data import conversation, write_chats
from conftest import ROOT, needs_fsdp
from safetensors.torch import load_file
from test_train import TINY, assert_same_run, in_corpus, metrics, tensors, train

from model import GPT, GPTConfig
from nib.common.exits import InputError
from nib.data.dataset import Dataset
from nib.data.sequences import Pairs
from nib.formats.load import build, open_source, read_config

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/
DPO = (
    "--dataset=pairs --init_from=out/base --schedule=constant --warmup_iters=0 --learning_rate=3e-3 --weight_decay=0"
).split()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model, and 20 pairs of different lengths: an answer with `!`, and one without."""
    train("--out_dir=out/base", "--max_iters=1", "--block_size=48")
    (tmp_path / "data").unlink()
    write_pairs(tmp_path / "data/pairs", 20)
    return Path("out/base")


def write_pairs(directory: Path, count: int) -> None:
    pairs = [
        conversation(f"{n} or {n * 7}?", "!" * (1 + n % 5) if side else f"{n * 3331}"[: 1 + n % 6])
        for n in range(count)
        for side in (1, 0)
    ]
    meta: dict[str, Any] = write_chats(directory, pairs, pairs[:8])
    (directory / "meta.json").write_text(json.dumps(meta | {"kind": "preference"}))


def opened(run: str) -> GPT:
    source = open_source(run)
    config = read_config(source, GPTConfig)
    return build(source, lambda: GPT(config)).eval()


@torch.no_grad()
def log_probability(model: GPT, ids: np.ndarray, learned: np.ndarray) -> float:
    """Of what is learned of one text, a token after the other, in float64."""
    logits = model(torch.from_numpy(ids[None, :-1].astype(np.int64)))[0].double().log_softmax(-1)[0]
    return sum(float(logits[at, ids[at + 1]]) for at in range(len(ids) - 1) if learned[at + 1])


def paper(policy: GPT, reference: GPT, data: Dataset, numbers: list[int], beta: float) -> dict[str, float]:
    """Equation 7 of arXiv 2305.18290, and the rewards of its section 4, written out pair by pair."""
    stream, found = data.train, []
    assert stream.starts is not None and stream.mask is not None
    for number in numbers:
        rewards = []
        for side in (0, 1):
            begin, end = stream.starts[2 * number + side : 2 * number + side + 2].tolist()
            text = stream.read(begin, end), stream.mask.read(begin, end)
            rewards.append(beta * (log_probability(policy, *text) - log_probability(reference, *text)))
        chosen, rejected = rewards
        loss = -math.log(1 / (1 + math.exp(-(chosen - rejected))))
        found.append((loss, chosen, rejected, chosen - rejected, float(chosen > rejected)))
    return dict(zip(("loss", "chosen", "rejected", "margin", "accuracy"), np.mean(found, axis=0).tolist(), strict=True))


@pytest.mark.parametrize("lora", [(), ("--lora_rank=4",)], ids=["whole model", "LoRA"])
def test_loss_and_rewards_are_the_papers_whatever_the_micro_batch(base: Path, lora: tuple[str, ...]) -> None:
    options = (*DPO, *lora, "--batch_size=20", "--dpo_beta=0.3", "--eval_interval=2")
    for micro in (20, 4):
        train(
            *options, "--max_iters=3", f"--micro_batch_size={micro}", f"--out_dir=out/{micro}", "--keep_checkpoints=0"
        )
        first, _, third = metrics(f"out/{micro}")
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert max(abs(first[name]) for name in ("chosen", "rejected", "margin")) < 1e-5
        exact = paper(opened(f"out/{micro}/checkpoints/step-00000002"), opened("out/base"), Dataset(Path("data/pairs")),
                      list(range(20)), 0.3)  # fmt: skip
        assert {name: third[name] for name in exact} == pytest.approx(exact, abs=2e-6)
        assert third["loss"] < first["loss"] and {"val_loss", "val_margin", "val_accuracy"} <= third.keys()


def test_a_run_of_dpo_resumes_to_the_bit_with_the_reference_it_began_with(base: Path) -> None:
    options = (*DPO, "--batch_size=4", "--eval_interval=3", "--optimizer=muon")
    train(*options, "--out_dir=out/whole", "--max_iters=6")
    train(*options, "--out_dir=out/parts", "--max_iters=3")
    train(*options, "--out_dir=out/parts", "--max_iters=6")
    assert_same_run("out/whole", "out/parts")
    held = [load_file(f"out/{run}/reference.safetensors") for run in ("whole", "parts")]
    assert torch.equal(held[0]["train"], held[1]["train"]) and held[0]["train"].shape == (20, 2)
    for change, message in {
        "--dpo_beta=0.2": r"dpo_beta is 0\.2 but the run in out/parts was made with 0\.1",
        "--lora_rank=2": "lora_rank is 2 but the run in out/parts was made with 0",
        "--objective=lm": "objective=lm needs texts or chats. data/pairs holds preference",
    }.items():
        with pytest.raises(InputError, match=message):
            train(*options, "--out_dir=out/parts", "--max_iters=9", change)
    reference = Path("out/parts/reference.safetensors")
    reference.write_bytes(reference.read_bytes()[:-8] + bytes(8))
    with pytest.raises(InputError, match=r"reference\.safetensors: it is not the file of this run"):
        train(*options, "--out_dir=out/parts", "--max_iters=9")


def test_what_dpo_cannot_do_is_refused_before_anything_is_written(base: Path, corpus: Path) -> None:
    Path("data/words").symlink_to(corpus / "data/words")
    for options, message in {
        ("--objective=dpo", "--dataset=words"): "objective=dpo needs rows of chosen and rejected.* holds text",
        ("--init_from=scratch",): "Give --init_from",
        ("--block_size=12",): "of 20 pairs in data/pairs do not fit into block_size 12: the longest has 1",
        ("--dataset=pairs:0.5,words:0.5",): "objective=dpo takes one dataset",
        ("--objective=lm",): "objective=lm needs texts or chats",
    }.items():
        with pytest.raises(InputError, match=message):
            train(*DPO, "--out_dir=out/wrong", *options)
    assert not Path("out/wrong").exists()
    assert Pairs(Dataset(Path("data/pairs")).train, 48).size == 20


@needs_fsdp
def test_two_sharded_processes_train_an_adapter_as_one_does(base: Path) -> None:
    options = (*DPO, "--batch_size=6", "--max_iters=3", "--dtype=float32", "--lora_rank=4")
    train(*options, "--out_dir=out/one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    command += [*TINY, *options, "--out_dir=out/two", "--parallel=fsdp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics("out/one"), metrics("out/two"), strict=True):
        names = ("loss", "chosen", "rejected", "margin", "accuracy")
        assert [one[name] for name in names] == pytest.approx([two[name] for name in names], abs=2e-4)
    one, two = tensors("out/one"), tensors("out/two")
    assert all((one[name] - two[name]).abs().mean() < 1e-4 for name in one) and one.keys() == two.keys()
