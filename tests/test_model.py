"""model.py (against Hugging Face's in test_huggingface.py): its positions, how it begins, and the numbers it states."""

from __future__ import annotations

import ast
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from model_helpers import GPT2_124M, LLAMA, MLPS, POSITIONS, random_model, random_tokens, tiny
from torch import Tensor, nn
from torch.nn import functional as F

import model as model_file
from model import GPT, GPTConfig
from nib.training.cost import flops_per_token, num_parameters

# ---- positions -----------------------------------------------------------------------------------------------------


def test_sinusoidal_positions_are_those_of_the_formula() -> None:
    config = tiny(position="sinusoidal", norm="rmsnorm", init="modern")
    model = GPT(config).eval()
    table = [
        [(math.sin, math.cos)[i % 2](p / 10000 ** ((i - i % 2) / config.n_embd)) for i in range(config.n_embd)]
        for p in range(config.block_size)
    ]
    # The angle is rounded to float32 before the sine: half of 2^-23 of up to 24.
    torch.testing.assert_close(model.sinusoid, torch.tensor(table), rtol=0, atol=2e-6)
    # With init=modern every block starts as the identity, so what the head sees is the embedding plus the table.
    tokens = random_tokens(2, 10)
    expected = model.norm(model.wte(tokens) * config.n_embd**0.5 + torch.tensor(table)[:10])
    torch.testing.assert_close(model.hidden(tokens), expected, rtol=0, atol=1e-5)


def test_rope_sees_only_distances() -> None:
    model = random_model(position="rope", n_layer=1)
    x = torch.randn(2, 4, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(query_at: int, key_at: int) -> Tensor:
        turned = [
            model_file.rotate(part[None], model.rope_cos[[at]], model.rope_sin[[at]])
            for part, at in zip(x, (query_at, key_at), strict=True)
        ]
        return (turned[0] * turned[1]).sum(-1)

    torch.testing.assert_close(score(7, 3), score(23, 19), rtol=0, atol=1e-5)
    assert (score(7, 3) - score(7, 4)).abs().max() > 0.01


@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_but_none_tells_the_order(position: str) -> None:
    """Without positions attention is a set operation: swapping two earlier tokens changes nothing in one layer."""
    model = random_model(position=position, n_layer=1)
    tokens = random_tokens(1, 8)
    swapped = tokens[:, [0, 2, 1, 3, 4, 5, 6, 7]]
    difference = (model(tokens)[0][0, -1] - model(swapped)[0][0, -1]).abs().max()
    assert difference < 1e-5 if position == "none" else difference > 1e-2


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mlp", MLPS)
def test_overfits_one_batch(position: str, mlp: str) -> None:
    torch.manual_seed(0)
    norm = "rmsnorm" if mlp == "swiglu" or position == "rope" else "layernorm"
    model = GPT(tiny(position=position, mlp=mlp, norm=norm, qk_norm=position == "rope", mlp_hidden=64))
    tokens = random_tokens(4, 13)
    tokens[:, 0] = torch.arange(4)  # what follows a first token is one token, so zero loss is possible
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(300):
        _, loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            assert abs(loss.item() - math.log(40)) < 0.5, "a new model is near the uniform distribution"
        if loss.item() < 0.02:
            return
    pytest.fail(f"loss {loss.item():.3f} after 300 steps on one batch")


# ---- counts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_of_gpt2_shape(tied: bool) -> None:
    V, T, L, C = 40, 24, 2, 32
    model = GPT(tiny(tie_weights=tied))
    block = 2 * 2 * C + (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C)
    total = V * C + T * C + L * block + 2 * C + (0 if tied else V * C)
    assert num_parameters(model) == total
    multiplying = V * C + L * (3 * C * C + C * C + 2 * 4 * C * C)  # the head, and the matrices of the blocks
    assert flops_per_token(model) == 6 * multiplying + 12 * L * C * T
    assert flops_per_token(model, 10) == 6 * multiplying + 12 * L * C * 10


def test_parameters_and_flops_of_llama_shape() -> None:
    V, L, C, H, K, D, M = 40, 2, 32, 4, 2, 16, 48
    settings = dict(LLAMA, n_kv_head=K, head_size=D, mlp_hidden=M, qk_norm=True, window=6)
    model = GPT(tiny(**settings))
    block = 2 * C + 2 * D + C * (H + 2 * K) * D + H * D * C + 3 * C * M
    assert num_parameters(model) == 2 * V * C + L * block + C
    multiplying = V * C + L * (block - 2 * C - 2 * D)
    assert flops_per_token(model) == 6 * multiplying + 12 * L * H * D * 6
    assert flops_per_token(model, 4) == 6 * multiplying + 12 * L * H * D * 4


def test_gpt2_has_124_million_parameters() -> None:
    with torch.device("meta"):
        assert num_parameters(GPT(GPTConfig(**GPT2_124M))) == 124_439_808


@pytest.mark.parametrize(("n_embd", "hidden"), [(32, 128), (96, 256), (384, 1024), (768, 2048)])
def test_swiglu_is_8_3_wide_in_multiples_of_64(n_embd: int, hidden: int) -> None:
    assert tiny(n_embd=n_embd, mlp="swiglu").mlp_hidden == hidden
    assert tiny(n_embd=n_embd, mlp="relu").mlp_hidden == 4 * n_embd


# ---- how it begins -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["gpt2", "modern"])
def test_initialisation(init: str) -> None:
    torch.manual_seed(0)
    C, L = 192, 3
    model = GPT(tiny(vocab_size=400, block_size=256, n_embd=C, n_layer=L, tie_weights=False, qk_norm=True, init=init))
    written = 0.02 / math.sqrt(2 * L) if init == "gpt2" else 0.0
    read = 0.02 if init == "gpt2" else C**-0.5
    wte, head = (0.02, 0.02) if init == "gpt2" else (0.3, 0.0)
    kinds = {"wte": wte, "wpe": wte, "qkv": read, "up": read, "head": head, "out": written, "down": written}
    for name, parameter in model.named_parameters():
        kind = name.split(".")[-2]
        if "norm" in kind:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            # The deviation of n >= 36864 numbers is known to 1/sqrt(2n) < 0.4 %; five times that.
            assert parameter.std().item() == pytest.approx(kinds[kind], rel=0.02), name
            assert abs(parameter.mean().item()) <= 0.03 * kinds[kind], name


def test_initialisation_is_a_function_of_the_seed() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.cat([parameter.flatten() for parameter in GPT(tiny()).parameters()])

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


# ---- dropout, recomputation, mixed precision -----------------------------------------------------------------------


def test_dropout_acts_in_training_only() -> None:
    with_dropout, without = random_model(dropout=0.5), random_model()
    tokens = random_tokens(2, 24)
    state = torch.get_rng_state()
    assert torch.equal(with_dropout(tokens)[0], without(tokens)[0])
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws nothing"

    with_dropout.train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(with_dropout(tokens)[0])
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2], atol=0.1)


@pytest.mark.parametrize("where", ["embedding", "attention", "attention out", "mlp"])
def test_dropout_is_in_each_of_its_places(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's four: the embedding, the attention weights, and the outputs of both halves of a block."""
    model, calls = random_model(dropout=0.25, n_layer=1), []
    model.train()
    plain_dropout, plain_attention = F.dropout, F.scaled_dot_product_attention

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        calls.append(("dropout", p, training))
        return plain_dropout(x, p, training)

    def attention(*args: Any, **options: Any) -> Tensor:
        calls.append(("attention", args[4], True))
        return plain_attention(*args, **options)

    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    model(random_tokens(1, 4))
    order = ["embedding", "attention", "attention out", "mlp"]
    kind = "attention" if where == "attention" else "dropout"
    assert calls[order.index(where)] == (kind, 0.25, True) and len(calls) == 4


def test_activation_checkpointing_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        model = random_model(dropout=0.2, position="rope", norm="rmsnorm").train()
        model.activation_checkpointing = recompute
        runs: list[int] = []
        model.blocks[0].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(3)
        _, loss = model(random_tokens(2, 12), random_tokens(2, 12, seed=1))
        loss.backward()
        assert len(runs) == (2 if recompute else 1)
        found.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


@pytest.mark.parametrize(
    "changes", [{}, {**LLAMA, "qk_norm": True, "n_kv_head": 2}, {"position": "sinusoidal"}], ids=str
)
def test_bfloat16_autocast_follows_float32(changes: dict[str, Any]) -> None:
    model = GPT(tiny(**changes))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)  # zero at the start, where nothing would be tested
    tokens = random_tokens(2, 24)
    _, expected = model(tokens, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, loss = model(tokens, tokens)
        cache = model.make_cache(2)
        model(tokens[:, :5], cache=cache)
        cache.lengths = [5, 3]
        model(tokens[:, 5:6], cache=cache)
    loss.backward()
    assert loss.dtype == torch.float32 and abs((loss - expected).item()) < 0.02
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- shapes that cannot be, and the file by itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 30}, "n_embd 30 is not divisible by n_head 4. Use n_embd=32"),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
        ({"n_kv_head": 8}, "n_head 4 is not divisible by n_kv_head 8"),
        ({"n_kv_head": -1}, "n_kv_head must be at least 0"),
        ({"position": "rope", "n_embd": 12}, "even head size, not 3"),
        ({"position": "sinusoidal", "n_head": 3, "n_embd": 27}, "even n_embd, not 27"),
        ({"position": "alibi"}, "position must be one of learned, sinusoidal, rope, none, not 'alibi'"),
        ({"mlp": "tanh"}, "mlp must be one of"),
        ({"norm": "batchnorm"}, "norm must be one of"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"block_size": -1}, "block_size must be at least 1"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"dropout": 1.0}, "dropout must be below 1"),
        ({"dropout": math.nan}, "dropout must be at least 0"),
        ({"window": -1}, "must be at least 0"),
        ({"mlp_hidden": -4}, "must be at least 0"),
        ({"head_size": -2}, "must be at least 0"),
    ],
    ids=str,
)
def test_impossible_shapes_say_what_to_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as found:
        tiny(**changes)
    assert message in str(found.value) and "\n" not in str(found.value)


def test_model_file_imports_only_torch_and_the_standard_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "model.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch"}


def test_model_file_works_alone(tmp_path: Path) -> None:
    shutil.copy(ROOT / "model.py", tmp_path)
    code = (
        "import torch, model; c = model.GPTConfig(vocab_size=9, block_size=8, n_layer=1, n_head=2, n_embd=8);"
        "m = model.GPT(c);"
        "t = torch.zeros(1, 8, dtype=torch.int64); print(model.__file__, tuple(m(t)[0].shape), m(t, t)[1].item() > 0)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1) == [str(tmp_path / "model.py"), "(1, 8, 9) True\n"]


# ---- writing by itself ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_generate_writes_what_the_plain_loop_does_beyond_the_context_too(position: str) -> None:
    model, tokens = random_model(position=position).train(), random_tokens(2, 5)
    written = model.generate(tokens, 40, temperature=0)
    assert written.shape == (2, 45) and model.training
    model.eval()
    seen = tokens
    for step in range(40):
        new = model(seen)[0][:, -1].argmax(-1, keepdim=True)
        assert torch.equal(written[:, 5 + step, None], new), step
        seen = torch.cat([seen, new], 1)
        seen = seen[:, -12:] if seen.shape[1] > 24 else seen  # the newer half of a full context


@torch.no_grad()
def test_generate_draws_from_the_most_probable_by_the_seed_of_torch() -> None:
    model, tokens = random_model(), random_tokens(200, 3)
    best = model(tokens)[0][:, -1].topk(3).indices
    for top_k, allowed in ((1, best[:, :1]), (3, best)):
        torch.manual_seed(1)
        drawn = model.generate(tokens, 1, temperature=2.0, top_k=top_k)[:, 3:]
        assert (drawn == allowed).any(-1).all()
        torch.manual_seed(1)
        assert torch.equal(model.generate(tokens, 1, temperature=2.0, top_k=top_k)[:, 3:], drawn)
    assert len({*(drawn == best).int().argmax(-1).tolist()}) == 3, "each of the three is drawn"
