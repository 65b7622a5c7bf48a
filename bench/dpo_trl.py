"""Compare nib's DPO with TRL's on the same models: loss, rewards and gradient norm on 20 pairs of various lengths.

    pip install trl peft          (in an environment that has nib's torch already)
    python bench/dpo_trl.py

The reference and the policy are small Llamas of the same shape with different random weights. TRL tokenizes the pairs
and computes the loss with its own trainer. Prints a table and one JSON line last.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import finish

PAIRS, BETA = 20, 0.1
WORDS = "def return if else for in while x y z self import os sys pass".split()


def main() -> None:
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        rows = make_pairs()
        ours, theirs = ours_of(rows), theirs_of(rows)
    print(f"{'':12} {'nib':>14} {'TRL':>14} {'difference':>12}")
    worst = 0.0
    for name, value in ours.items():
        difference = abs(value - theirs[name])
        worst = max(worst, difference)
        print(f"{name:12} {value:14.9f} {theirs[name]:14.9f} {difference:12.1e}")
    finish({"pairs": PAIRS, "nib": ours, "trl": theirs, "worst": worst}, worst < 1e-6, check=False)


def make_pairs() -> list[dict[str, str]]:
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    return [
        {"prompt": words(8) + " ", "chosen": f"{words(9)} a{number}", "rejected": f"{words(9)} b{number}"}
        for number in range(PAIRS)
    ]


def ours_of(rows: list[dict[str, str]]) -> dict[str, float]:
    """The loss, rewards and gradient norm of train.py's first step on all pairs. Writes the two models for TRL."""
    import prepare_data
    import train as script
    from model import GPT, GPTConfig
    from nib.formats.checkpoint import write_checkpoint
    from nib.formats.export import export
    from nib.formats.load import open_source
    from nib.tokenizer.load import load_tokenizer
    from nib.training.start import start
    from nib.training.step import optimizer_step

    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sys.argv = ["prepare_data.py", "pairs.jsonl", "--format=preference", "--tokenizer=byte", "--val-fraction=0"]
    prepare_data.main()
    tokenizer, shape = load_tokenizer(Path("data/pairs")), dict(n_layer=2, n_head=4, n_embd=32, block_size=256)
    config = GPTConfig(vocab_size=tokenizer.vocab_size, qk_norm=False, **shape)
    for seed, name in enumerate(("reference", "policy")):
        torch.manual_seed(seed)
        model = GPT(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
        state = {"step": 0, "model_config": vars(config)}
        write_checkpoint(Path(f"out/{name}/checkpoints"), model.state_dict(), {}, state, tokenizer)
        export(open_source(name), config, model.state_dict(), Path(name))
    options = [f"--batch_size={PAIRS}", f"--dpo_beta={BETA}", "--device=cpu", "--dataset=pairs", "--grad_clip=0"]
    parsed = script.read_settings([*options, "--init_from=out/reference", "--out_dir=out/dpo", "--micro_batch_size=5"])
    with start(parsed, GPT, GPTConfig) as run:
        weights = open_source("out/policy").weights()  # type: ignore[call-arg]
        run.model.load_state_dict(weights)
        loss, grad_norm = optimizer_step(run, run.next_batch())
        found = {"loss": loss, "grad_norm": grad_norm} | run.measured
        return {name: float(value) for name, value in found.items()}


def theirs_of(rows: list[dict[str, str]]) -> dict[str, float]:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained("policy")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy, reference = (AutoModelForCausalLM.from_pretrained(name) for name in ("policy", "reference"))
    options: Any = dict(
        output_dir="trl", beta=BETA, per_device_train_batch_size=PAIRS, report_to="none", use_cpu=True, bf16=False,
        max_length=None, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        policy, reference, args=DPOConfig(**options), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    policy.train()
    loss = trainer.compute_loss(policy, batch)
    loss.backward()
    grad_norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), float("inf")))
    found = {key: float(np.mean(values)) for key, values in trainer._metrics["train"].items()}
    names = {"chosen": "rewards/chosen", "rejected": "rewards/rejected", "margin": "rewards/margins"}
    rewards = {ours: found[theirs] for ours, theirs in (names | {"accuracy": "rewards/accuracies"}).items()}
    return {"loss": float(loss), "grad_norm": grad_norm} | rewards


if __name__ == "__main__":
    main()
