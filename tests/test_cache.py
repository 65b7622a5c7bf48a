"""The key/value cache: what it computes is what the model computes without it; and who sees whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_helpers import POSITIONS, random_model, random_tokens
from torch import Tensor

from nib.generation.engine import Rows, take_rows

# ---- the cache -----------------------------------------------------------------------------------------------------

CACHED = [
    *({"position": position} for position in POSITIONS),
    {"position": "rope", "n_kv_head": 2, "qk_norm": True, "norm": "rmsnorm", "mlp": "swiglu"},
    {"position": "rope", "n_kv_head": 1, "window": 5},
    {"position": "rope", "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 8},
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
    cache = model.make_cache(3)
    logits, _ = model(padded, cache=cache)
    for row, length in enumerate(lengths):
        near(logits[row, :length], expected[row, :length])
    cache.lengths = list(lengths)
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
        cache = model.make_cache(2)
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
    cache = model.make_cache(2)
    model(tokens[:, :20], cache=cache)
    cache.lengths = list(lengths)
    before = cache.memory.clone()
    with pytest.raises(ValueError, match=r"context is full: 20 \+ 5 positions exceed 24"):
        model(tokens[:, :5], cache=cache)
    assert cache.lengths == lengths and torch.equal(cache.memory, before)
    model(tokens[:, :4], cache=cache)
    assert cache.lengths == [length + 4 for length in lengths]
    with pytest.raises(ValueError, match="context is full"):
        model(tokens[:, :1], cache=cache)


def test_more_tokens_than_the_context_are_refused() -> None:
    model = random_model()
    with pytest.raises(ValueError, match="25 tokens do not fit into block_size 24"):
        model(random_tokens(1, 25))


def test_a_cache_may_be_shorter_than_the_context_but_never_longer() -> None:
    model = random_model()
    assert model.make_cache(1, 10).max_length == 10
    assert model.make_cache(1, 100).max_length == model.make_cache(1).max_length == 24


@torch.no_grad()
def test_truncated_rows_go_on_as_if_never_longer() -> None:
    model, tokens = random_model(position="rope", n_kv_head=2), random_tokens(2, 24)
    cache = model.make_cache(2)
    model(random_tokens(2, 20, seed=9), cache=cache)
    cache.lengths = [0, 0]
    model(tokens[:, :10], cache=cache)
    cache.lengths = [4, 7]
    logits, _ = model(torch.stack([tokens[0, 4:8], tokens[1, 7:11]]), cache=cache)
    expected, _ = model(tokens)
    near(logits, torch.stack([expected[0, 4:8], expected[1, 7:11]]))
    assert cache.lengths == [8, 11]


@torch.no_grad()
def test_taken_rows_are_copies_that_branch() -> None:
    model, tokens = random_model(position="rope"), random_tokens(3, 24)
    cache = model.make_cache(2)
    model(tokens[:2, :10], cache=cache)
    cache.lengths = [6, 10]
    kept = cache.memory.clone()
    branches = take_rows(cache, [1, 0, 1])
    assert branches.lengths == [10, 6, 10] and branches.max_length == 24
    logits, _ = model(tokens[[2, 0, 1], 10:12], cache=branches)
    joined = [torch.cat([tokens[row, :length], tokens[then, 10:12]]) for row, length, then in
              [(1, 10, 2), (0, 6, 0), (1, 10, 1)]]  # fmt: skip
    for row, text in enumerate(joined):
        near(logits[row], model(text[None])[0][0, -2:])
    assert torch.equal(cache.memory, kept) and cache.lengths == [6, 10]


@torch.no_grad()
def test_put_rows_replaces_rows_and_no_others() -> None:
    model, tokens = random_model(position="rope"), random_tokens(3, 24)
    cache, other = model.make_cache(3), model.make_cache(2, 12)
    model(tokens[:, :14], cache=cache)
    cache.lengths = [14, 5, 9]
    model(tokens[[1, 0], 10:20], cache=other)
    other.lengths = [10, 4]
    Rows.put_rows(SimpleNamespace(cache=cache, device=torch.device("cpu")), [2, 0], other)
    assert cache.lengths == [4, 5, 10]
    logits, _ = model(tokens[:, :1], cache=cache)
    texts = [tokens[0, 10:14], tokens[1, :5], tokens[1, 10:20]]
    for row, text in enumerate(texts):
        near(logits[row], model(torch.cat([text, tokens[row, :1]])[None])[0][0, -1:])


# ---- who sees whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 2, 5, 11, 12, 13])
@pytest.mark.parametrize("lengths", [None, [0, 0], [4, 4], [4, 0], [0, 9]])
@pytest.mark.parametrize("new", [1, 2, 12])
def test_mask_is_the_brute_force_mask(window: int, lengths: list[int] | None, new: int) -> None:
    model = random_model(window=window, n_layer=1)
    cache = None
    if lengths is not None:
        cache = model.make_cache(2)
        cache.lengths = list(lengths)
    _, mask, _, _ = model.attention_inputs(torch.zeros(2, new, dtype=torch.int64), cache)
    starts = lengths or [0, 0]
    total = max(starts) + new
    expected = [
        [
            [key <= start + query and (not window or key > start + query - window) for key in range(total)]
            for query in range(new)
        ]
        for start in starts
    ]
    if mask is None:  # attention is causal where T > 1; a single query sees all keys
        assert new == 1 or new == total
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    else:
        mask = mask.squeeze(1) if mask.dim() == 4 else mask
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
