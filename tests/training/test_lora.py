"""LoRA by train.py and after it: what is trained, what a checkpoint holds, and what is merged and refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Call
from model_helpers import random_tokens
from safetensors.torch import load_file
from test_train import assert_same_run, in_corpus, losses, tensors, train

import evaluate
import export
import sample
from model import GPT, GPTConfig
from nib.common.exits import InputError
from nib.formats.checkpoint import KEEP_FILE, open_checkpoint
from nib.formats.load import build, open_source, read_config
from nib.training.lora import add_adapter
from nib.training.optimizer import Muon, make_optimizers
from nib.training.settings import TrainSettings

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/
LORA = ("--init_from=out/base", "--lora_rank=4", "--schedule=constant", "--warmup_iters=0", "--learning_rate=1e-2")


@pytest.fixture
def base() -> Path:
    assert train("--out_dir=out/base", "--max_iters=2", "--n_kv_head=1", "--mlp_hidden=48") == 0
    return Path("out/base")


def opened(target: str, adapter: str = "") -> GPT:
    source = open_source(target, adapter=adapter)
    config = read_config(source, GPTConfig)
    return build(source, lambda: GPT(config)).eval()


@torch.no_grad()
def logits(model: GPT) -> torch.Tensor:
    return model(random_tokens(2, 20))[0]


def test_a_new_adapter_changes_no_bit_and_muon_does_not_touch_it(base: Path) -> None:
    model, optimizer = opened("out/base"), dict(learning_rate=1.0, muon_learning_rate=1.0, weight_decay=0.0)
    before = logits(model)
    add_adapter(model, TrainSettings(lora_rank=2, lora_alpha=4.0, lora_targets="q,v,up"))
    assert torch.equal(logits(model), before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    slices = [f"{layer}.lora_{side}" for layer in ("attention.qkv.q", "attention.qkv.v", "mlp.up.up") for side in "AB"]
    assert trained == {f"blocks.{block}.{name}" for block in range(2) for name in slices}
    (only,) = make_optimizers(model, kind="muon", betas=(0.9, 0.95), **optimizer)
    assert not isinstance(only, Muon)
    assert sum(len(group["params"]) for group in only.param_groups) == len(trained)


def test_a_run_of_lora_resumes_to_the_bit_and_holds_the_adapter_alone(base: Path) -> None:
    options = (*LORA, "--lora_dropout=0.2", "--lora_targets=q,k,down,gate", "--activation_checkpointing")
    assert train(*options, "--out_dir=out/whole", "--max_iters=6") == 0
    assert train(*options, "--out_dir=out/parts", "--max_iters=3") == 0
    assert train(*options, "--out_dir=out/parts", "--max_iters=6") == 0
    assert_same_run("out/whole", "out/parts")
    assert losses("out/whole")[-1] < losses("out/whole")[0]
    held = tensors("out/whole")
    assert len(held) == 2 * 2 * 4 and all(".lora_" in name and tensor.any() for name, tensor in held.items())
    for change, message in {
        "--lora_rank=3": "lora_rank is 3 but the run in out/parts was made with 4",
        "--lora_alpha=9": "lora_alpha is 9.0 but the run in out/parts was made with 8.0",
        "--init_from=base": "init_from is 'base' but the run in out/parts was made with 'out/base'",
    }.items():
        with pytest.raises(InputError, match=message):
            train(*options, "--out_dir=out/parts", "--max_iters=9", change)
    shutil.rmtree("out/base")
    train("--out_dir=out/base", "--max_iters=2", "--n_kv_head=1", "--mlp_hidden=48", "--seed=1")
    with pytest.raises(InputError, match="is not the base that the run in out/parts began with"):
        train(*options, "--out_dir=out/parts", "--max_iters=9")
    with pytest.raises(InputError, match=r"another base than out/base.*which was /.*out/base/checkpoints/step"):
        opened("out/base", "out/parts")


def test_what_is_not_set_is_what_users_of_peft_expect(base: Path) -> None:
    train("--init_from=out/base", "--lora_rank=3", "--out_dir=out/run", "--max_iters=1", "--min_lr=1e-4")
    settings = open_checkpoint(Path("out/run")).state["settings"]
    assert (settings["learning_rate"], settings["weight_decay"], settings["lora_alpha"]) == (3e-3, 0.0, 6.0)


def test_an_adapter_is_sampled_scored_merged_and_written_for_peft(base: Path, call: Call, tmp_path: Path) -> None:
    train(*LORA, "--out_dir=out/run", "--max_iters=4")

    def done(main: object, *arguments: str) -> str:
        result = call(main, *arguments, cwd=tmp_path)  # type: ignore[arg-type]
        assert result.returncode == 0, result.stderr
        return result.stdout

    done(export.main, "run", "peft", "--format=peft")
    done(export.main, "run", "merged", "--merge", "--dtype=float32")
    done(export.main, "base", "hf")
    Path("out/base").rename("out/moved")  # then the adapter needs the base before it
    done(export.main, "moved", "merged again", "--adapter=run", "--merge", "--dtype=float32")
    done(export.main, "moved", "peft again", "--adapter=run", "--format=peft")
    Path("out/moved").rename("out/base")
    merged = [Path(place, "model.safetensors").read_bytes() for place in ("merged", "merged again")]
    assert merged[0] == merged[1]
    (base_checkpoint,) = Path("out/base/checkpoints").glob("step-*")
    assert (base_checkpoint / KEEP_FILE).exists()
    ways = (["run"], ["base", "--adapter=run"], ["hf", "--adapter=peft"], ["peft again"], ["merged"])
    texts = {done(sample.main, *way, "--prompt=line", "--max-new-tokens=8", "--device=cpu") for way in ways}
    assert len(texts) == 1 and texts != {done(sample.main, "base", "--prompt=line", "--max-new-tokens=8")}
    scores = [
        json.loads(done(evaluate.main, *way, "--data=words", "--max-tokens=99", "--json"))["loss"] for way in ways
    ]
    assert max(scores) - min(scores) < 1e-6
    config = json.loads(Path("peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"][0]) == (4, 8, "down_proj")
    written, name = load_file("peft/adapter_model.safetensors"), "base_model.model.model.layers.1.mlp.up_proj.lora"
    A, B = (written[f"{name}_{side}.weight"] for side in "AB")
    assert (A.shape, B.shape) == ((4, 32), (48, 4))
    names = "model.layers.1.mlp.up_proj.weight"
    before, after = (load_file(f"{place}/model.safetensors")[names] for place in ("hf", "merged"))
    torch.testing.assert_close(after, before + 2 * B @ A, rtol=0, atol=1e-7)

    for main, arguments, message in (
        (sample.main, ["base", "--adapter=run", "--quantize=int8"], "error: an adapter is not merged into 8 bits"),
        (sample.main, ["run", "--quantize=int8"], "error: an adapter is not merged into 8 bits"),
        (sample.main, ["base", "--adapter=base"], "error: base holds a whole model, not an adapter"),
        (export.main, ["run", "new"], "is an adapter. Add --merge for a whole model, or --format=peft"),
        (export.main, ["base", "new", "--merge"], "has no adapter"),
        (export.main, ["run", "new", "--merge", "--format=peft"], "--merge makes a whole model"),
    ):
        result = call(main, *arguments, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not Path("new").exists()


def test_an_adapter_of_a_longer_context_is_merged_and_not_written_for_peft(base: Path, call: Call) -> None:
    train(*LORA, "--out_dir=out/long", "--max_iters=1", "--block_size=64", "--rope_scaling=linear")
    train(*LORA, "--out_dir=out/long", "--max_iters=2", "--block_size=64", "--rope_scaling=linear")
    assert opened("out/long").config.rope_scaling == "linear"
    result = call(export.main, "out/long", "new", "--format=peft", cwd=Path.cwd())
    assert result.returncode == 2 and "error: rope_scaling differs from the base's" in result.stderr


def test_wrong_settings_are_refused_before_anything_is_written(base: Path) -> None:
    for options, message in {
        ("--lora_rank=4", "--init_from=scratch"): "init_from is scratch",
        ("--lora_rank=33",): "lora_rank 33 is too large for blocks.0.attention.qkv, at most 16",
        ("--lora_rank=0", "--lora_alpha=8"): "lora_alpha is set, but lora_rank is 0",
        ("--lora_rank=4", "--lora_targets=q,head"): "lora_targets has 'head': an embedding or head is not adapted",
        ("--lora_rank=4", "--lora_targets=query"): "lora_targets has 'query': there is none of this name",
        ("--lora_rank=4", "--lora_targets=,"): "lora_targets is empty",
    }.items():
        with pytest.raises(InputError, match=message):
            train("--init_from=out/base", "--out_dir=out/wrong", *options)
    train("--out_dir=out/plain", "--max_iters=1", "--mlp=gelu")
    with pytest.raises(InputError, match=r"lora_targets has 'gate', which the model lacks\. It has q,k,v,o,up,down"):
        train("--init_from=out/plain", "--lora_rank=4", "--lora_targets=gate", "--out_dir=out/wrong")
    assert not Path("out/wrong").exists()
