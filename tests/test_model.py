"""model.py: the network against Hugging Face's, its loss, its cache, its masks, and the numbers it states."""

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
from torch import Tensor, nn
from torch.nn import functional as F

import model as model_file
from model import GPT, MLPS, POSITIONS, GPTConfig, KVCache

torch.set_num_threads(1)


def tiny(**changes: Any) -> GPTConfig:
    settings: dict[str, Any] = dict(vocab_size=40, block_size=24, n_layer=2, n_head=4, n_embd=32)
    return GPTConfig(**{**settings, **changes})


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights so large that no part of the network can be left out, or two of its parts swapped, unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.3 * drawn if is_gain else 0.3 * drawn)


def random_model(**changes: Any) -> GPT:
    model = GPT(tiny(**changes))
    randomise(model)
    return model.eval()


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 40) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- the same model as Hugging Face's ----------------------------------------------------------------------------

# Ours: theirs, one above the other. N is the layer.
GPT2_NAMES = {
    "wte.weight": ["transformer.wte.weight"],
    "wpe.weight": ["transformer.wpe.weight"],
    "norm.weight": ["transformer.ln_f.weight"],
    "norm.bias": ["transformer.ln_f.bias"],
    "blocks.N.attention_norm.weight": ["transformer.h.N.ln_1.weight"],
    "blocks.N.attention_norm.bias": ["transformer.h.N.ln_1.bias"],
    "blocks.N.attention.qkv.weight": ["transformer.h.N.attn.c_attn.weight"],
    "blocks.N.attention.qkv.bias": ["transformer.h.N.attn.c_attn.bias"],
    "blocks.N.attention.out.weight": ["transformer.h.N.attn.c_proj.weight"],
    "blocks.N.attention.out.bias": ["transformer.h.N.attn.c_proj.bias"],
    "blocks.N.mlp_norm.weight": ["transformer.h.N.ln_2.weight"],
    "blocks.N.mlp_norm.bias": ["transformer.h.N.ln_2.bias"],
    "blocks.N.mlp.up.weight": ["transformer.h.N.mlp.c_fc.weight"],
    "blocks.N.mlp.up.bias": ["transformer.h.N.mlp.c_fc.bias"],
    "blocks.N.mlp.down.weight": ["transformer.h.N.mlp.c_proj.weight"],
    "blocks.N.mlp.down.bias": ["transformer.h.N.mlp.c_proj.bias"],
}
LLAMA_NAMES = {
    "wte.weight": ["model.embed_tokens.weight"],
    "head.weight": ["lm_head.weight"],
    "norm.weight": ["model.norm.weight"],
    "blocks.N.attention_norm.weight": ["model.layers.N.input_layernorm.weight"],
    "blocks.N.attention.qkv.weight": [f"model.layers.N.self_attn.{name}_proj.weight" for name in "qkv"],
    "blocks.N.attention.q_norm.weight": ["model.layers.N.self_attn.q_norm.weight"],
    "blocks.N.attention.k_norm.weight": ["model.layers.N.self_attn.k_norm.weight"],
    "blocks.N.attention.out.weight": ["model.layers.N.self_attn.o_proj.weight"],
    "blocks.N.mlp_norm.weight": ["model.layers.N.post_attention_layernorm.weight"],
    "blocks.N.mlp.up.weight": ["model.layers.N.mlp.gate_proj.weight", "model.layers.N.mlp.up_proj.weight"],
    "blocks.N.mlp.down.weight": ["model.layers.N.mlp.down_proj.weight"],
}


def load_theirs(ours: GPT, theirs: nn.Module) -> None:
    """Give `ours` the weights of a Hugging Face model; every weight of theirs must find its place."""
    names = GPT2_NAMES if hasattr(theirs, "transformer") else LLAMA_NAMES
    weights, used, converted = theirs.state_dict(), set(), {}
    for name in ours.state_dict():
        layer = name.split(".")[1]
        sources = names[name.replace(f".{layer}.", ".N.", 1)]
        if ours.config.mlp != "swiglu":
            sources = [source for source in sources if "gate_proj" not in source]
        sources = [source.replace(".N.", f".{layer}.") for source in sources]
        parts = [weights[source] for source in sources]
        is_conv1d = names is GPT2_NAMES and parts[0].ndim == 2 and ".h." in sources[0]  # stored input by output
        converted[name] = torch.cat([part.T if is_conv1d else part for part in parts])
        used.update(sources)
    assert set(weights) - used <= {"lm_head.weight"}, "weights of theirs that nothing of ours takes"
    ours.load_state_dict(converted)


def llama_like(config: GPTConfig) -> dict[str, Any]:
    return dict(
        vocab_size=config.vocab_size, max_position_embeddings=config.block_size, hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
        head_dim=config.head_size, intermediate_size=config.mlp_hidden, rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base, rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tie_weights, attn_implementation="eager",
    )  # fmt: skip


LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, tie_weights=False)
SAME_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", {}),
    "Llama": ("Llama", LLAMA),
    "Llama, grouped heads, rope base": ("Llama", {**LLAMA, "n_kv_head": 2, "rope_base": 500.0, "norm_eps": 1e-3}),
    "Llama, one key/value head, tied": ("Llama", {**LLAMA, "n_kv_head": 1, "tie_weights": True}),
    "Qwen3": ("Qwen3", {**LLAMA, "n_kv_head": 2, "qk_norm": True, "head_size": 16, "rope_base": 1e6, "norm_eps": 1e-6}),
    "Arcee": ("Arcee", {**LLAMA, "mlp": "relu2", "mlp_hidden": 48}),
}


@pytest.mark.parametrize("name", SAME_MODELS)
def test_logits_equal_hugging_face(name: str) -> None:
    import transformers

    kind, changes = SAME_MODELS[name]
    config = tiny(**changes)
    if not hasattr(transformers, f"{kind}ForCausalLM") and kind == "Arcee":
        pytest.skip("this transformers has no Arcee")
    if kind == "GPT2":
        their_config = transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, layer_norm_epsilon=config.norm_eps, attn_implementation="eager",
        )  # fmt: skip
        theirs = transformers.GPT2LMHeadModel(their_config).eval()
    else:
        their_config = getattr(transformers, f"{kind}Config")(**llama_like(config))
        theirs = getattr(transformers, f"{kind}ForCausalLM")(their_config).eval()
    randomise(theirs)
    ours = GPT(config).eval()
    load_theirs(ours, theirs)
    tokens = random_tokens(3, config.block_size)
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, ours(tokens)[0]
    # float32 keeps 2^-24 = 6e-8 of a number; a sum of some 100 terms, twice in each of 2 blocks whose attention is
    # sharp with weights like these, loses about a factor of 20 more (found: 8 to 22), and another order of summation
    # on another machine somewhat more. Any wrong permutation changes the first digit.
    scale = float(expected.abs().max())
    assert scale > 3, "weights too small to show a mistake"
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * scale)


# ---- positions ---------------------------------------------------------------------------------------------------


def test_sinusoidal_positions_are_those_of_the_formula() -> None:
    config = tiny(position="sinusoidal", norm="rmsnorm")
    model = GPT(config).eval()
    table = [
        [(math.sin, math.cos)[i % 2](p / 10000 ** ((i - i % 2) / config.n_embd)) for i in range(config.n_embd)]
        for p in range(config.block_size)
    ]
    # The angle is rounded to float32 before the sine: half of 2^-23 of up to 24.
    torch.testing.assert_close(model.sinusoid, torch.tensor(table), rtol=0, atol=2e-6)
    # With rmsnorm every block begins as the identity, so what the head sees is the embedding plus the table.
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


# ---- the loss ----------------------------------------------------------------------------------------------------


def masked_targets(seed: int = 1) -> Tensor:
    targets = random_tokens(3, 20, seed=seed)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.25] = -1
    return targets


def loss_and_gradients(
    model: GPT, targets: Tensor, *, rows: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Loss and gradients, in chunks of `rows` rows of logits; "stream" is the gradient of what the head reads."""
    model.max_logits = rows * model.config.vocab_size
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        x = model.hidden(random_tokens(3, 20))
        x.retain_grad()
        loss = model.loss(x, targets)
    assert loss.dtype == torch.float32
    (loss * 3).backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "stream": x.grad, **found}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 59])
def test_chunked_loss_is_the_plain_loss(tied: bool, rows: int) -> None:
    model, targets = random_model(tie_weights=tied), masked_targets()
    plain = loss_and_gradients(model, targets, rows=60)
    by_hand = F.cross_entropy(model(random_tokens(3, 20))[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(plain["loss"], by_hand)
    chunked = loss_and_gradients(model, targets, rows=rows)
    assert chunked.keys() == plain.keys()
    for name, expected in plain.items():
        # The same terms in another order: float32 rounding of the largest of them.
        bound = 2e-6 * float(expected.abs().max())
        torch.testing.assert_close(chunked[name], expected, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows", [7, 60])
def test_loss_with_no_target_is_zero(rows: int) -> None:
    found = loss_and_gradients(random_model(), torch.full((3, 20), -1), rows=rows)
    assert all(not value.any() for value in found.values()), "and so are all gradients"


@pytest.mark.parametrize("rows", [7, 60])
def test_masked_targets_count_nothing(rows: int) -> None:
    model, targets = random_model(), masked_targets()
    model.max_logits = rows * 40
    kept = targets.flatten() >= 0
    x = model.hidden(random_tokens(3, 20)).flatten(0, 1)[kept]
    expected = F.cross_entropy(model.logits(x), targets.flatten()[kept])
    torch.testing.assert_close(model(random_tokens(3, 20), targets)[1], expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 7])
def test_chunked_loss_is_the_plain_loss_under_autocast(rows: int) -> None:
    model, targets = random_model(), masked_targets()
    plain = loss_and_gradients(model, targets, rows=60, dtype=torch.bfloat16)
    chunked = loss_and_gradients(model, targets, rows=rows, dtype=torch.bfloat16)
    # Both round the logits to bfloat16 at the same place, and sum in float32.
    torch.testing.assert_close(chunked["loss"], plain["loss"], rtol=2e-6, atol=0)
    for name in plain.keys() - {"loss"}:
        # The gradient of each logit is rounded to bfloat16, 2^-9 of it, before or after the mean is taken; the
        # rounding errors of the layers behind are as large, and not the same.
        error = (chunked[name] - plain[name]).norm() / plain[name].norm().clamp_min(1e-9)
        assert error < 2**-6, (name, float(error))


def test_chunked_loss_keeps_no_logits() -> None:
    """What is alive between forward and backward is the size of x and W, not of the logits."""
    model = GPT(GPTConfig(vocab_size=5000, block_size=64, n_layer=1, n_head=2, n_embd=16))
    model.max_logits = 4 * 5000
    tokens = random_tokens(4, 64, vocab_size=5000)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        model(tokens, tokens)
    assert max(saved) <= 5000 * 16 < 4 * 64 * 5000


def test_chunked_loss_without_gradients() -> None:
    model = random_model()
    model.max_logits = 7 * 40
    with torch.no_grad():
        _, quiet = model(random_tokens(3, 20), masked_targets())
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, model(random_tokens(3, 20), masked_targets())[1].detach())


# ---- the cache ---------------------------------------------------------------------------------------------------

CACHED = [
    *({"position": position} for position in POSITIONS),
    {"position": "rope", "n_kv_head": 2, "qk_norm": True, "norm": "rmsnorm", "mlp": "swiglu"},
    {"position": "rope", "n_kv_head": 1, "window": 5},
    {"position": "learned", "window": 1},
    {"position": "none", "window": 9, "bias": False},
]


def near(actual: Tensor, expected: Tensor) -> None:
    """Equal but for the order in which attention adds up float32 numbers."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("changes", CACHED, ids=str)
@torch.no_grad()
def test_cached_and_uncached_logits_agree(changes: dict[str, Any]) -> None:
    """Rows of different lengths, filled from a padded batch, go on in steps of several tokens and of one."""
    model, tokens = random_model(**changes), random_tokens(3, 24)
    expected, _ = model(tokens)
    lengths = [3, 9, 1]
    padded = tokens[:, :9].clone()
    for row, length in enumerate(lengths):
        padded[row, length:] = 39 - row  # padding, which nothing may see
    cache = KVCache(model.config, 3)
    logits, _ = model(padded, cache=cache)
    for row, length in enumerate(lengths):
        near(logits[row, :length], expected[row, :length])
    cache.truncate(lengths)
    while max(lengths) < 24:
        step = 4 if max(lengths) in (9, 14) else 1
        new = torch.stack([tokens[row, length : length + step] for row, length in enumerate(lengths)])
        logits, _ = model(new, cache=cache)
        for row, length in enumerate(lengths):
            near(logits[row], expected[row, length : length + step])
        lengths = [length + step for length in lengths]
        assert cache.lengths == lengths


@pytest.mark.parametrize("changes", CACHED, ids=str)
@torch.no_grad()
def test_cached_rows_of_one_length_agree(changes: dict[str, Any]) -> None:
    """Rows that do not differ take a path of their own, to the very last position of the context."""
    model, tokens = random_model(**changes), random_tokens(2, 24)
    expected, _ = model(tokens)
    for steps in ([1, 6, 1, 1, 5, *[1] * 10], [2, 21, 1], [24]):
        cache = KVCache(model.config, 2)
        begin = 0
        for step in steps:
            logits, _ = model(tokens[:, begin : begin + step], cache=cache)
            near(logits, expected[:, begin : begin + step])
            begin += step
        assert begin == 24


@pytest.mark.parametrize("lengths", [[20, 20], [20, 3]])
@torch.no_grad()
def test_full_cache_refuses_and_changes_nothing(lengths: list[int]) -> None:
    model, tokens = random_model(), random_tokens(2, 24)
    cache = KVCache(model.config, 2)
    model(tokens[:, :20], cache=cache)
    cache.truncate(lengths)
    before = cache.keys.clone(), cache.values.clone()
    with pytest.raises(ValueError, match="context is full: 20 \\+ 5 positions do not fit into 24"):
        model(tokens[:, :5], cache=cache)
    assert cache.lengths == lengths and torch.equal(cache.keys, before[0]) and torch.equal(cache.values, before[1])
    model(tokens[:, :4], cache=cache)
    assert cache.lengths == [length + 4 for length in lengths]
    with pytest.raises(ValueError, match="context is full"):
        model(tokens[:, :1], cache=cache)


def test_more_tokens_than_the_context_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="25 tokens do not fit into block_size 24"):
        model(random_tokens(1, 25))


def test_a_cache_may_be_shorter_than_the_context_but_never_longer() -> None:
    assert KVCache(tiny(), 1, 10).max_length == 10
    assert KVCache(tiny(), 1, 100).max_length == KVCache(tiny(), 1).max_length == 24


@torch.no_grad()
def test_truncated_rows_go_on_as_if_never_longer() -> None:
    model, tokens = random_model(position="rope", n_kv_head=2), random_tokens(2, 24)
    cache = KVCache(model.config, 2)
    model(random_tokens(2, 20, seed=9), cache=cache)
    cache.truncate([0, 0])
    model(tokens[:, :10], cache=cache)
    cache.truncate([4, 7])
    logits, _ = model(torch.stack([tokens[0, 4:8], tokens[1, 7:11]]), cache=cache)
    expected, _ = model(tokens)
    near(logits, torch.stack([expected[0, 4:8], expected[1, 7:11]]))
    for wrong in ([9, 3], [4], [4, 4, 4]):
        with pytest.raises(ValueError, match="cannot truncate"):
            cache.truncate(wrong)
    assert cache.lengths == [8, 11]


@torch.no_grad()
def test_taken_rows_are_copies_that_branch() -> None:
    model, tokens = random_model(position="rope"), random_tokens(3, 24)
    cache = KVCache(model.config, 2)
    model(tokens[:2, :10], cache=cache)
    cache.truncate([6, 10])
    kept = cache.keys.clone()
    branches = cache.take_rows([1, 0, 1])
    assert branches.lengths == [10, 6, 10] and branches.max_length == 24
    logits, _ = model(tokens[[2, 0, 1], 10:12], cache=branches)
    joined = [torch.cat([tokens[row, :length], tokens[then, 10:12]]) for row, length, then in
              [(1, 10, 2), (0, 6, 0), (1, 10, 1)]]  # fmt: skip
    for row, text in enumerate(joined):
        near(logits[row], model(text[None])[0][0, -2:])
    assert torch.equal(cache.keys, kept) and cache.lengths == [6, 10]


@torch.no_grad()
def test_put_rows_replaces_rows_and_no_others() -> None:
    model, tokens = random_model(position="rope"), random_tokens(3, 24)
    cache, other = KVCache(model.config, 3), KVCache(model.config, 2, 12)
    model(tokens[:, :14], cache=cache)
    cache.truncate([14, 5, 9])
    model(tokens[[1, 0], 10:20], cache=other)
    other.truncate([10, 4])
    cache.put_rows([2, 0], other)
    assert cache.lengths == [4, 5, 10]
    logits, _ = model(tokens[:, :1], cache=cache)
    texts = [tokens[0, 10:14], tokens[1, :5], tokens[1, 10:20]]
    for row, text in enumerate(texts):
        near(logits[row], model(torch.cat([text, tokens[row, :1]])[None])[0][0, -1:])


# ---- who sees whom -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 2, 5, 11, 12, 13])
@pytest.mark.parametrize("lengths", [None, [0, 0], [4, 4], [4, 0], [0, 9]])
@pytest.mark.parametrize("new", [1, 2, 12])
def test_mask_is_the_brute_force_mask(window: int, lengths: list[int] | None, new: int) -> None:
    model = random_model(window=window, n_layer=1)
    cache = None
    if lengths is not None:
        cache = KVCache(model.config, 2)
        cache.lengths = list(lengths)
    context = model.context(torch.zeros(2, new, dtype=torch.int64), cache)
    starts = lengths or [0, 0]
    total = max(starts) + new
    expected = [
        [
            [key <= start + query and (not window or key > start + query - window) for key in range(total)]
            for query in range(new)
        ]
        for start in starts
    ]
    if context.mask is None:  # then attention is told to be causal where T > 1, and T = 1 sees everything
        assert new == 1 or new == total
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    else:
        mask = context.mask.squeeze(1) if context.mask.dim() == 4 else context.mask
    assert torch.equal(mask.expand(2, new, total), torch.tensor(expected))


@pytest.mark.parametrize("window", [0, 1, 3])
@torch.no_grad()
def test_a_token_reaches_the_positions_of_its_window_only(window: int) -> None:
    model, tokens = random_model(window=window, n_layer=1), random_tokens(1, 9)
    before, _ = model(tokens)
    for changed in range(9):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 40
        moved = (model(other)[0] - before).abs().amax(-1)[0] > 1e-4
        expected = [query >= changed and (not window or query - changed < window) for query in range(9)]
        assert moved.tolist() == expected, f"position {changed}"


# ---- counts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_and_flops_of_gpt2_shape(tied: bool) -> None:
    V, T, L, C = 40, 24, 2, 32
    model = GPT(tiny(tie_weights=tied))
    block = 2 * 2 * C + (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C)
    total = V * C + T * C + L * block + 2 * C + (0 if tied else V * C)
    assert model.num_parameters() == total
    multiplying = total - T * C - (0 if tied else V * C)  # tables are looked up; a tied one is the head as well
    assert model.flops_per_token() == 6 * multiplying + 12 * L * C * T
    assert model.flops_per_token(10) == 6 * multiplying + 12 * L * C * 10


def test_parameters_and_flops_of_llama_shape() -> None:
    V, L, C, H, K, D, M = 40, 2, 32, 4, 2, 16, 48
    settings = dict(LLAMA, n_kv_head=K, head_size=D, mlp_hidden=M, qk_norm=True, window=6)
    model = GPT(tiny(**settings))
    block = 2 * C + 2 * D + C * (H + 2 * K) * D + H * D * C + 3 * C * M
    assert model.num_parameters() == 2 * V * C + L * block + C
    assert model.flops_per_token() == 6 * (V * C + L * block + C) + 12 * L * H * D * 6
    assert model.flops_per_token(4) == 6 * (V * C + L * block + C) + 12 * L * H * D * 4


def test_gpt2_has_124_million_parameters() -> None:
    with torch.device("meta"):
        assert GPT(GPTConfig()).num_parameters() == 124_439_808


@pytest.mark.parametrize(("n_embd", "hidden"), [(32, 128), (96, 256), (384, 1024), (768, 2048)])
def test_swiglu_is_8_3_wide_in_multiples_of_64(n_embd: int, hidden: int) -> None:
    assert tiny(n_embd=n_embd, mlp="swiglu").mlp_hidden == hidden
    assert tiny(n_embd=n_embd, mlp="relu").mlp_hidden == 4 * n_embd


# ---- how it begins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_initialisation(norm: str) -> None:
    torch.manual_seed(0)
    C, L = 192, 3
    model = GPT(tiny(vocab_size=400, block_size=256, n_embd=C, n_layer=L, norm=norm, tie_weights=False, qk_norm=True))
    written = 0.02 / math.sqrt(2 * L) if norm == "layernorm" else 0.0
    read = 0.02 if norm == "layernorm" else C**-0.5
    kinds = {"wte": 0.02, "wpe": 0.02, "qkv": read, "up": read, "head": read, "out": written, "down": written}
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


# ---- dropout, recomputation, mixed precision ---------------------------------------------------------------------


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
        cache = KVCache(model.config, 2)
        model(tokens[:, :5], cache=cache)
        cache.truncate([5, 3])
        model(tokens[:, 5:6], cache=cache)
    loss.backward()
    assert loss.dtype == torch.float32 and abs((loss - expected).item()) < 0.02
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- shapes that cannot be, and the file by itself ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 30}, "n_embd 30 is not divisible by n_head 4. Use n_embd=32"),
        ({"n_kv_head": 3}, "n_head 4 is not divisible by n_kv_head 3"),
        ({"n_kv_head": 8}, "n_head 4 is not divisible by n_kv_head 8"),
        ({"n_kv_head": -1}, "n_kv_head must be at least 1"),
        ({"position": "rope", "n_embd": 12}, "even head size, not 3"),
        ({"position": "sinusoidal", "n_head": 3, "n_embd": 27}, "even n_embd, not 27"),
        ({"position": "alibi"}, "position must be one of learned, sinusoidal, rope, none, not 'alibi'"),
        ({"mlp": "tanh"}, "mlp must be one of"),
        ({"norm": "batchnorm"}, "norm must be one of"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"block_size": -1}, "block_size must be at least 1"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"dropout": 1.0}, "dropout lies in"),
        ({"dropout": math.nan}, "dropout lies in"),
        ({"window": -1}, "cannot be negative"),
        ({"mlp_hidden": -4}, "cannot be negative"),
        ({"head_size": -2}, "cannot be negative"),
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
