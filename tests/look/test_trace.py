"""What is recorded of a model is what it computes, whatever its options, and whatever its user changed in model.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_helpers import GPT2, LLAMA, random_model, random_tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from model import GPT, MLP, Attention, Block, KVCache
from nib.generation.scoring import Window, token_log_probs
from nib.look.snapshot import HABITS, NAMED, habits, take_snapshot
from nib.look.trace import Trace
from nib.tokenizer.tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("".join(map(chr, range(48, 88))))  # 40 ids, as model_helpers.tiny has
IDS = random_tokens(20).tolist()
KINDS: dict[str, dict[str, Any]] = {
    "GPT-2": {},
    "Llama, grouped heads": LLAMA | dict(n_kv_head=2),
    "one key/value head, QK-norm, window": LLAMA | dict(n_kv_head=1, qk_norm=True, window=5),
    "wide heads, tied": LLAMA | dict(head_size=12, tie_weights=True),
    "sinusoidal, relu2": GPT2 | dict(position="sinusoidal", mlp="relu2"),
    "no positions, one layer": GPT2 | dict(position="none", n_layer=1),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> GPT:
    return random_model(**KINDS[request.param])


class Calls(TorchFunctionMode):
    """The values and the result of each call of scaled_dot_product_attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        if function is F.scaled_dot_product_attention:
            self.seen.append((arguments[2], result))
        return result


@torch.no_grad()
def traced(model: GPT) -> tuple[Trace, list[tuple[Tensor, Tensor]]]:
    with Calls() as calls, Trace(model) as trace:
        model.hidden(torch.tensor([IDS]))
    return trace, calls.seen


def logits_of(model: GPT) -> Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([IDS]))[0]
    assert logits is not None
    return logits[0]


def test_maps_times_values_are_what_attention_returned_and_rows_add_to_one(model: GPT) -> None:
    trace, seen = traced(model)
    assert len(trace.calls) == len(seen) == model.config.n_layer
    for call, (values, returned) in zip(trace.calls, seen, strict=True):
        (weights,) = call.maps
        assert weights.shape == (model.config.n_head, len(IDS), len(IDS))
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-6)
        each = values[0].repeat_interleave(model.config.n_head // model.config.n_kv_head, 0)
        assert float((weights @ each - returned[0]).abs().max() / returned.abs().max()) < 1e-6
        assert call.error < 1e-6
        if window := model.config.window:
            assert not weights.tril(-window).any() and weights.diagonal(1 - window, -2, -1).all()


def test_the_last_row_of_the_lens_is_what_the_model_says(model: GPT) -> None:
    found, logits = take_snapshot(model, IDS, TOKENIZER), logits_of(model)
    assert not found["missing"].keys() - {"positions"}
    assert len(found["lens_ids"]) == model.config.n_layer + 1
    best = logits.softmax(-1).topk(3)
    assert torch.equal(found["lens_ids"][-1], best.indices.int())
    assert torch.allclose(found["lens_probs"][-1], best.values, atol=1e-6)
    assert torch.allclose(found["lens_came"][-1].log(), -found["surprise"], atol=1e-4)
    assert torch.equal(found["lens_rank"][-1], found["came_rank"])
    assert not torch.allclose(found["lens_probs"][0], best.values, atol=1e-2)


def test_shares_add_to_the_logits(model: GPT) -> None:
    found, logits = take_snapshot(model, IDS, TOKENIZER), logits_of(model).double()
    layers = range(1, model.config.n_layer + 1)
    names = ["embedding", *(f"{part} {layer}" for layer in layers for part in ("attention", "mlp"))]
    assert found["share_names"] == names + ["bias"] * (model.config.norm == "layernorm")
    ids = found["share_ids"].long()
    assert ids[0, :-1].tolist() == IDS[1:] and torch.equal(ids[1], logits.argmax(-1))
    wanted = logits.gather(1, ids.T).T
    assert float((found["shares"].sum(1) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    assert float(found["shares"].abs().amax((0, 2)).min()) > 1e-3  # nothing is left out


def test_surprise_is_what_evaluate_finds(model: GPT) -> None:
    (log_probs,) = token_log_probs(model, [Window(IDS, 1)])
    assert torch.allclose(-take_snapshot(model, IDS, TOKENIZER)["surprise"], torch.tensor(log_probs), atol=1e-6)


def test_nothing_stays_in_the_model_and_its_results_are_the_same(model: GPT) -> None:
    before = logits_of(model)
    take_snapshot(model, IDS, TOKENIZER)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(logits_of(model), before)


def test_one_token_is_enough() -> None:
    found = take_snapshot(random_model(), IDS[:1], TOKENIZER)
    assert not found["missing"] and found["surprise"].shape == (0,) and found["ids"].shape == (1, NAMED)


def test_heads_are_named_by_what_they_do() -> None:
    ids = torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 4, 5])
    maps = torch.zeros(5, 10, 10)
    query = torch.arange(10)
    maps[0, query, (query - 1).clamp_min(0)] = 1
    maps[1, query, query] = 1
    maps[2, :, 0] = 1
    maps[3, query[5:], query[5:] - 5] = 1
    maps[4, query[5:], query[5:] - 4] = 1
    scores = habits(maps, ids)
    assert scores.argmax(1).tolist() == list(range(len(HABITS)))
    assert torch.allclose(scores.diagonal(), torch.ones(()))
    assert habits(maps[:, :4, :4], ids[:4])[:, 3:].isnan().all()  # no token came twice


# A model.py that its user changed


def changed(monkeypatch: pytest.MonkeyPatch, kind: type, method: str, change: Any, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(kind, method, change)
    model = random_model(**options)
    found = take_snapshot(model, IDS, TOKENIZER)
    (log_probs,) = token_log_probs(model, [Window(IDS, 1)])
    assert torch.allclose(-found["surprise"], torch.tensor(log_probs), atol=1e-5)
    if "shares" in found:
        wanted = logits_of(model).double().gather(1, found["share_ids"].long().T).T
        assert float((found["shares"].sum(1) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    return found


def test_attention_of_its_own_lacks_the_maps_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean_of_all_before(
        self: Attention, x: Tensor, positions: Tensor, mask: Tensor, rotation: list[Tensor], cache: KVCache
    ) -> Tensor:
        return self.out(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])

    found = changed(monkeypatch, Attention, "forward", mean_of_all_before)
    assert list(found["missing"]) == ["attention"] and "scaled_dot_product_attention" in found["missing"]["attention"]
    assert "maps" not in found


def test_two_calls_in_a_block_are_more_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Attention.forward

    def twice(self: Attention, x: Tensor, *inputs: Any) -> Tensor:
        return forward(self, x, *inputs) - 0.3 * forward(self, -x, *inputs)

    found = changed(monkeypatch, Attention, "forward", twice)
    assert not found["missing"] and found["heads"] == [8, 8] and len(found["maps"]) == 16


def test_a_block_that_scales_its_parts_has_one_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(self: Block, x: Tensor, *inputs: Any) -> Tensor:
        x = x + 0.5 * self.attention(self.attention_norm(x), *inputs)
        return x + self.mlp(self.mlp_norm(x))

    found = changed(monkeypatch, Block, "forward", scaled)
    assert found["share_names"] == ["embedding", "block 1", "block 2", "bias"]


def test_parallel_parts_and_a_step_between_blocks_have_their_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def parallel(self: Block, x: Tensor, *inputs: Any) -> Tensor:
        h = self.attention_norm(x)
        return x + self.attention(h, *inputs) + self.mlp(h)

    def hidden(self: GPT, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        inputs = self.attention_inputs(tokens, cache)
        x = first = self.wte(tokens)
        for block in self.blocks:
            x = 0.9 * block(x, *inputs) + 0.1 * first
        return self.norm(x)

    monkeypatch.setattr(GPT, "hidden", hidden)
    found = changed(monkeypatch, Block, "forward", parallel)
    wanted = "embedding, attention 1, mlp 1, before 2, attention 2, mlp 2, after the blocks, bias"
    assert found["share_names"] == wanted.split(", ")
    assert list(found["missing"]) == ["lens"] and "after its last block" in found["missing"]["lens"]


def test_a_block_that_is_called_twice_is_two_layers() -> None:
    model = random_model()
    model.blocks = nn.ModuleList([*model.blocks, model.blocks[0]])
    found = take_snapshot(model, IDS, TOKENIZER)
    assert not found["missing"] and found["heads"] == [4, 4, 4] and len(found["lens_ids"]) == 4


def test_logits_that_are_no_sum_have_no_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    def capped(self: GPT, x: Tensor) -> Tensor:
        return 15 * torch.tanh(F.linear(x, self.wte.weight) / 15)

    found = changed(monkeypatch, GPT, "logits", capped)
    assert list(found["missing"]) == ["shares"] and "not linear" in found["missing"]["shares"]


def test_a_model_of_another_kind_says_what_is_missing() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(40, 8)

        def hidden(self, tokens: Tensor, cache: object = None) -> Tensor:
            return self.embedding(tokens).cumsum(1)

        def logits(self, x: Tensor) -> Tensor:
            return x @ self.embedding.weight.T

    found = take_snapshot(Bag().eval(), IDS, TOKENIZER)
    assert set(found["missing"]) == {"attention", "lens", "shares", "positions", "neighbours"}
    assert found["surprise"].isfinite().all()


def test_attention_to_later_tokens_has_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = F.scaled_dot_product_attention

    def both_ways(self: Attention, x: Tensor, *inputs: Any) -> Tensor:
        q, k, v = self.qkv(x).view(1, x.shape[1], -1, self.head_size).transpose(1, 2).split_with_sizes(self.heads, 1)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(1, x.shape[1], -1))

    monkeypatch.setattr(Attention, "forward", both_ways)
    found = take_snapshot(random_model(), IDS, TOKENIZER)
    assert "later" in found["missing"]["attention"]


def test_a_scale_of_its_own_and_a_mask_of_numbers_are_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    def biased(self: Attention, x: Tensor, *inputs: Any) -> Tensor:  # ALiBi, arXiv 2108.12409
        q, k, v = self.qkv(x).view(1, x.shape[1], -1, self.head_size).transpose(1, 2).split_with_sizes(self.heads, 1)
        at = torch.arange(x.shape[1])
        mask = (at - at[:, None]).float().masked_fill(at > at[:, None], -math.inf)
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, scale=0.1)
        return self.out(y.transpose(1, 2).reshape(1, x.shape[1], -1))

    assert not changed(monkeypatch, Attention, "forward", biased)["missing"]


def test_a_changed_feed_forward_layer_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not changed(monkeypatch, MLP, "forward", lambda self, x: x.sin())["missing"]
