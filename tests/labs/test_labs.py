"""The labs: each runs for a few steps, its runs are sampled and resumed; mixture and latents are transformers'."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lab import compare, train_one

import latent_attention
import mixture_of_experts
import norm_placement
import normalisation
import positions
import pytest
import torch
import what_carries
from conftest import Call, run_script
from model_helpers import random_tokens, randomise
from safetensors.torch import load_file
from test_look import read_page
from torch import Tensor, nn

import export as export_script
import look
import model
import sample
from nib.common.exits import InputError

LABS = {
    "positions": positions, "norm_placement": norm_placement, "what_carries": what_carries,
    "normalisation": normalisation, "mixture_of_experts": mixture_of_experts, "latent_attention": latent_attention,
}  # fmt: skip
PARTS = ("Block", "GPT", "GPTConfig", "make_norm")
FEW = (
    "--dataset=words --n_embd=32 --n_head=2 --block_size=16 --batch_size=4 --max_iters=2 --warmup_iters=1 --seeds=1 "
    "--eval_tokens=200 --device=cpu"
).split()


@pytest.fixture(autouse=True)
def in_corpus(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(corpus / "data")


def put(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the lab's parts in the place of model.py's, as its `main` does."""
    for part in PARTS:
        if hasattr(lab, part) or (part == "make_norm" and hasattr(lab, "make_any_norm")):
            monkeypatch.setattr(model, part, getattr(lab, "make_any_norm" if part == "make_norm" else part))


@pytest.mark.parametrize("name", LABS)
def test_a_lab_prints_its_table_and_its_runs_are_sampled_and_looked_at(
    name: str, monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    """The file as it is run, but in this process."""
    lab = LABS[name]
    for part in PARTS:  # which the lab replaces
        monkeypatch.setattr(model, part, getattr(model, part))
    main, code = ModuleType("__main__"), compile(Path(lab.__file__).read_text(), lab.__file__, "exec")
    main.__file__ = lab.__file__
    monkeypatch.setitem(sys.modules, "__main__", main)
    done = call(lambda: exec(code, main.__dict__), *FEW, "--n_layer=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.partition("\none seed: ")[0].splitlines()
    headings = ["parameters", "bits per byte", *getattr(lab, "MEASURES", ())]
    assert all(heading in head for heading in headings), head
    assert [row.split("  ")[0] for row in rows] == list(lab.VARIANTS)
    assert "nan" not in "".join(rows) and "inf" not in "".join(rows)
    assert done.stdout.endswith("\n" + lab.__doc__.strip().split("\n\n")[-1] + "\n") and "\nConclusion: " in done.stdout
    runs = sorted(map(str, Path("out/labs", name).iterdir()))
    assert len(runs) == len(lab.VARIANTS)
    for run in runs:
        shown = call(look.main, run, "--prompt=line", "--max-new-tokens=4", cwd=tmp_path)
        assert shown.returncode == 0 and "look.html: 8 tokens" in shown.stdout, shown.stderr
        written = call(sample.main, run, "--prompt=line", "--max-new-tokens=4", "--json", cwd=tmp_path)
        assert written.returncode == 0, written.stderr
        page = read_page(Path("look.html"))
        assert page["tokens"] == [*b"line", *json.loads(written.stdout)["tokens"]]
        missing = page["snapshots"][0]["missing"]
        # Neither RoPE nor no positions have a table; shares of a logit take a LayerNorm or an RMSNorm at the end.
        assert missing.keys() <= {"positions"} | ({"shares"} if name == "normalisation" else set()), missing


def test_scripts_need_the_lab_in_front(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling by the lab, in a process of its own, and by nib alone, which lacks its option."""
    with monkeypatch.context() as patch:
        put(norm_placement, patch)
        compare("placed", {"post, norm": dict(placement="post")}, [*FEW, "--out_dir=out/own"])
    run = "out/own/post_norm-1337"
    done = run_script("labs/norm_placement.py", "sample.py", run, "--max-new-tokens=5", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout, done.stderr
    done = call(sample.main, run, "--max-new-tokens=5", cwd=tmp_path)
    assert done.returncode == 2 and "does not fit this model.py" in done.stderr and "placement" in done.stderr


def test_the_table_says_how_far_seeds_are_apart(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    values = iter((1.0, 2.0, 4.0, 3.0, 3.0, 3.0))
    monkeypatch.setattr("lab.train_one", lambda *_: (next(values), None))
    compare("seeds", {"one": {}, "other": {}}, [*FEW, "--seeds=3"])
    _, one, other, noise = capsys.readouterr().out.splitlines()[:4]
    assert "+0.000" in one and "1.000 2.000 4.000" in one and "+0.667" in other
    assert noise == "3 seeds; two seeds of the same variant are 1.000 apart on average"  # 1, 3, 2 and thrice 0


def test_export_names_an_architecture_or_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    put(mixture_of_experts, monkeypatch)
    few = {"dense": dict(mlp_hidden=32), "sparse": dict(mlp_hidden=16, experts=4)}
    compare("mixture", few, FEW)
    done = call(export_script.main, "out/labs/mixture/dense-1337", "dense", cwd=Path.cwd())
    assert done.returncode == 0 and "Qwen3" in done.stdout, done.stderr
    done = call(export_script.main, "out/labs/mixture/sparse-1337", "sparse", cwd=Path.cwd())
    assert done.returncode == 2 and "no architecture of transformers has experts=4" in done.stderr


def test_a_labs_run_is_resumed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of the router and running means are state: neither trial pass nor resuming may move them."""
    from lab import LabSettings

    from nib.common.options import parse

    for lab, options in (
        (mixture_of_experts, dict(experts=4, mlp_hidden=16)),
        (normalisation, dict(norm_kind="batch")),
    ):
        with monkeypatch.context() as patch:
            put(lab, patch)
            for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
                arguments = [*FEW, f"--max_iters={steps}", "--schedule=constant"]
                parsed = parse(LabSettings, arguments, usage="", about="", config_file=True)
                train_one(parsed, Path(lab.__name__, out), 1, options)
        whole, parts = (
            load_file(Path(lab.__name__, out, "checkpoints/step-00000004/model.safetensors"))
            for out in ("whole", "parts")
        )
        assert all(torch.equal(whole[name], parts[name]) for name in whole), lab.__name__
        moving = [name for name in whole if name.endswith((".bias", "running_mean"))]
        assert moving and all(whole[name].abs().sum() > 0 for name in moving)


def test_one_layer_without_positions_sees_a_set_and_two_see_an_order() -> None:
    effects = {}
    for layers in (1, 2):
        options = dict(vocab_size=40, block_size=32, n_embd=32, n_head=4, position="none", n_layer=layers)
        made = model.GPT(model.GPTConfig(**options))
        randomise(made)
        effects[layers] = positions.order_effect(made)
    assert effects[1] < 1e-5 and effects[2] > 0.1


def test_only_batchnorm_leaks_and_only_it_needs_more_than_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    put(normalisation, monkeypatch)
    for name, options in normalisation.VARIANTS.items():
        made = model.GPT(
            model.GPTConfig(vocab_size=40, block_size=32, n_embd=32, n_head=4, n_layer=2, qk_norm=False, **options)
        )
        randomise(made)
        leaks, works = normalisation.leak(made) > 1e-3, normalisation.one_token(made) == "works"
        assert (leaks, works) == ((True, False) if name == "batchnorm" else (False, True)), name


def copy(theirs: nn.Module, weights: dict[str, Tensor]) -> None:
    left = set(theirs.state_dict()) - set(weights)
    assert not left, left
    theirs.load_state_dict(weights)


def common(theirs: Any, ours: Any, layer: int) -> dict[str, Tensor]:
    """What both labs' models share with transformers': embeddings, norms, head."""
    at, block = f"model.layers.{layer}", ours.blocks[layer]
    return {
        "model.embed_tokens.weight": ours.wte.weight, "model.norm.weight": ours.norm.weight,
        "lm_head.weight": ours.head.weight, f"{at}.input_layernorm.weight": block.attention_norm.weight,
        f"{at}.post_attention_layernorm.weight": block.mlp_norm.weight,
    }  # fmt: skip


def assert_same_logits(ours: Any, theirs: Any) -> None:
    """Whole, and with both caches: a prompt, then one token at a time."""
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        found = ours.eval()(tokens)[0]
        cache, past, cached, theirs_cached = ours.make_cache(2, 12), None, [], []
        for begin, end in ((0, 5), *((each, each + 1) for each in range(5, 12))):
            cached.append(ours(tokens[:, begin:end], cache=cache)[0])
            result = theirs(tokens[:, begin:end], past_key_values=past, use_cache=True)
            past = result.past_key_values
            theirs_cached.append(result.logits)
    limit = 2e-6 * expected.abs().max()  # float32, in another order
    assert (found - expected).abs().max() <= limit
    assert (torch.cat(cached, 1) - torch.cat(theirs_cached, 1)).abs().max() <= limit
    assert (torch.cat(cached, 1) - found).abs().max() <= limit


def test_the_mixture_is_qwen3s(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    put(mixture_of_experts, monkeypatch)
    E, L = 4, 2
    ours = model.GPT(mixture_of_experts.GPTConfig(
        vocab_size=40, block_size=24, n_layer=L, n_head=4, n_kv_head=2, n_embd=32, mlp_hidden=24, tie_weights=False,
        norm_eps=1e-6, experts=E,
    ))  # fmt: skip
    randomise(ours)
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=L, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        moe_intermediate_size=24, num_experts=E, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1,
        rms_norm_eps=1e-6, max_position_embeddings=24, tie_word_embeddings=False, mlp_only_layers=[],
    ))  # fmt: skip
    weights: dict[str, Tensor] = {}
    for layer, block in enumerate(ours.blocks):
        at, attention, experts = f"model.layers.{layer}", block.attention, block.mlp.experts
        q, k, v = attention.qkv.weight.split([32, 16, 16])
        weights |= common(theirs, ours, layer) | {
            f"{at}.self_attn.q_proj.weight": q, f"{at}.self_attn.k_proj.weight": k,
            f"{at}.self_attn.v_proj.weight": v, f"{at}.self_attn.o_proj.weight": attention.out.weight,
            f"{at}.self_attn.q_norm.weight": attention.q_norm.weight,
            f"{at}.self_attn.k_norm.weight": attention.k_norm.weight,
            f"{at}.mlp.gate.weight": block.mlp.router.weight,
        }  # fmt: skip
        if f"{at}.mlp.experts.gate_up_proj" in theirs.state_dict():  # transformers 5
            weights[f"{at}.mlp.experts.gate_up_proj"] = torch.stack([each.up.weight for each in experts])
            weights[f"{at}.mlp.experts.down_proj"] = torch.stack([each.down.weight for each in experts])
        else:
            for number, each in enumerate(experts):
                gate, up = each.up.weight.chunk(2)
                names = dict(gate_proj=gate, up_proj=up, down_proj=each.down.weight)
                weights |= {f"{at}.mlp.experts.{number}.{name}.weight": matrix for name, matrix in names.items()}
    copy(theirs, weights)
    assert_same_logits(ours, theirs)


def test_latent_attention_is_deepseeks(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    put(latent_attention, monkeypatch)
    L, R, D, H, rank = 2, 8, 8, 4, 16
    ours = model.GPT(latent_attention.GPTConfig(
        vocab_size=40, block_size=24, n_layer=L, n_head=H, n_embd=32, mlp_hidden=48, tie_weights=False, norm_eps=1e-6,
        kv_rank=rank, rope_size=R, qk_norm=False,
    ))  # fmt: skip
    randomise(ours)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=H, q_lora_rank=None, kv_lora_rank=rank, qk_rope_head_dim=R, qk_nope_head_dim=D,
        v_head_dim=D,
        first_k_dense_replace=L, rope_interleave=False, rms_norm_eps=1e-6, max_position_embeddings=24,
        tie_word_embeddings=False,
    ))  # fmt: skip
    weights: dict[str, Tensor] = {}
    for layer, block in enumerate(ours.blocks):
        at, attention = f"model.layers.{layer}", block.attention
        gate, up = block.mlp.up.weight.chunk(2)
        weights |= common(theirs, ours, layer) | {
            f"{at}.self_attn.q_proj.weight": attention.query.weight,
            f"{at}.self_attn.kv_a_proj_with_mqa.weight": attention.compress.weight,
            f"{at}.self_attn.kv_a_layernorm.weight": attention.latent_norm.weight,
            f"{at}.self_attn.kv_b_proj.weight": attention.expand.weight,
            f"{at}.self_attn.o_proj.weight": attention.out.weight,
            f"{at}.mlp.gate_proj.weight": gate, f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": block.mlp.down.weight,
        }  # fmt: skip
    copy(theirs, weights)
    assert_same_logits(ours, theirs)
    assert ours.make_cache(1, 1).memory.numel() == L * (rank + R)


def test_biases_bring_back_an_expert_that_is_not_chosen() -> None:
    shape = dict(vocab_size=40, n_embd=32, n_head=4, mlp_hidden=16, experts=4)
    for balance, even in ((0.01, True), (0.0, False)):
        torch.manual_seed(0)
        mixture = mixture_of_experts.Mixture(mixture_of_experts.GPTConfig(**shape, balance=balance)).train()
        x = torch.randn(4, 32, 32)
        x[..., 0] = 4.0  # what all tokens have in common makes the router prefer one expert
        counts = []
        with torch.no_grad():
            mixture.router.weight[:, 0] = torch.tensor([0.3, 0.0, 0.0, -0.5])
            for _ in range(100):
                mixture(x)
                counts.append(mixture.counts.clone())
        used = torch.stack(counts[-20:]).mean(0)
        assert counts[0].min() < 0.4 * counts[0].mean()
        assert (used.max() < 1.1 * used.mean() and used.min() > 0.9 * used.mean()) == even, used


def test_a_lab_trains_from_scratch_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="variants are trained from scratch"):
        compare("positions", positions.VARIANTS, [*FEW, "--init_from=out/a"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="a lab runs in one process"):
        compare("positions", positions.VARIANTS, FEW)
