"""From logits to a token: every filter against its definition, and draws against the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nib.common.exits import RunError
from nib.generation.request import SamplingSettings
from nib.generation.sampling import (
    choose,
    choose_by_torch,
    inverse_cdf,
    nucleus,
    row_generator,
    top_ids,
    top_ids_of_row,
)

ALMOST_ONE = 1 - 2**-24  # the largest uniform number


def make_settings(**changes) -> SamplingSettings:
    """Settings that filter nothing but by the changes."""
    return SamplingSettings(**(dict(temperature=1.0, top_k=0) | changes))


def reference_distribution(logits: np.ndarray, options: SamplingSettings, seen: np.ndarray) -> np.ndarray:
    """The probabilities of one row by the definitions, in float64; sorting is stable, so ties go to low ids."""
    logits = logits.astype(np.float64)
    penalty = options.repetition_penalty
    logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
    order = np.argsort(-logits, kind="stable")
    if options.temperature == 0:
        return (np.arange(len(logits)) == order[0]).astype(float)
    weights = np.exp((logits - logits.max()) / options.temperature)
    if options.top_k:
        weights[order[options.top_k :]] = 0
    probabilities = weights / weights.sum()
    if options.top_p < 1:
        reached = np.cumsum(probabilities[order])
        assume(np.abs(reached - options.top_p).min() > 1e-5)  # else rounding decides
        probabilities[order[np.searchsorted(reached, options.top_p) + 1 :]] = 0
    share = probabilities / probabilities.max()
    assume(options.min_p in (0, 1) or np.abs(share - options.min_p).min() > 1e-5)
    probabilities[share < options.min_p] = 0
    return probabilities / probabilities.sum()


@settings(max_examples=400, deadline=None)
@given(
    quarters=st.lists(st.integers(-30, 30), min_size=2, max_size=40),
    seen=st.sets(st.integers(0, 39)),
    uniform=st.floats(0, ALMOST_ONE, width=32),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([0.0, 0.3, 0.77, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.37, 1.0]),
    penalty=st.sampled_from([0.5, 1.0, 1.0, 2.0]),
)
def test_choose_draws_from_the_distribution_of_the_definitions(
    quarters, seen, uniform, temperature, top_k, top_p, min_p, penalty
):
    options = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    logits = np.array(quarters, dtype=np.float32) / 4  # coarse, so that there are many ties
    is_seen = np.isin(np.arange(len(logits)), list(seen))
    cumulative = np.cumsum(reference_distribution(logits, options, is_seen))
    assume(np.abs(cumulative[:-1] - uniform).min(initial=1) > 1e-5)
    expected = [int(np.searchsorted(cumulative / cumulative[-1], uniform, side="right"))]
    for way in (choose, choose_by_torch):
        token = way(torch.tensor(logits)[None], torch.tensor([uniform]), options, torch.tensor(is_seen)[None])
        assert token.tolist() == expected, way


def shares(logits: Tensor, count: int, **options) -> np.ndarray:
    """How often each token is chosen for `count` uniform numbers at equal distances, by numpy and by torch."""
    uniforms = (torch.arange(count) + 0.5) / count
    numpys, torchs = (
        np.bincount(way(logits.expand(count, -1), uniforms, make_settings(**options), None), minlength=logits.shape[-1])
        for way in (choose, choose_by_torch)
    )
    assert np.abs(numpys - torchs).max() <= 1, "more than rounding at a border"
    return numpys / count


def test_filters_and_their_order_are_those_of_transformers():
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper
    from transformers import TopPLogitsWarper as TopP

    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 2
    for options in (
        dict(temperature=0.7, top_k=30, top_p=0.8, min_p=0.1),
        dict(temperature=1.5, top_k=8, top_p=0.6, min_p=0.01),
        dict(temperature=1.5, top_k=50, top_p=0.95, min_p=0.3),
    ):
        filters = [TemperatureLogitsWarper, TopKLogitsWarper, TopP, MinPLogitsWarper]
        processors = LogitsProcessorList([make(value) for make, value in zip(filters, options.values(), strict=True)])
        expected = processors(None, logits).softmax(-1)[0].numpy()
        assert np.abs(shares(logits, 20000, **options) - expected).max() < 1.5 / 20000  # one step each side


def test_the_samples_of_many_rows_have_the_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.0, 0.0, -1.0, -3.0]])
    uniforms = torch.tensor([row_generator(7, number, [1]).random(dtype=np.float32) for number in range(20000)])
    tokens = choose(logits.expand(20000, -1), uniforms, make_settings())
    expected = 20000 * logits.softmax(-1)[0].numpy()
    found = np.bincount(tokens.numpy(), minlength=6)
    chi_square = ((found - expected) ** 2 / expected).sum()
    assert chi_square < 20.5, "less than one in a thousand at 5 degrees of freedom"


def test_top_k_takes_exactly_k_with_ties_to_the_lowest_ids():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0, 5.0]])
    assert top_ids(logits, 3).tolist() == [[1, 2, 3], [0, 1, 5]]
    assert [top_ids_of_row(row, 3).tolist() for row in logits.numpy()] == [[1, 2, 3], [0, 1, 5]]
    assert top_ids(torch.zeros(1, 50000), 7).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert top_ids_of_row(np.zeros(50000, dtype=np.float32), 7).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert np.flatnonzero(shares(logits[:1], 100, top_k=3, temperature=9.0)).tolist() == [1, 2, 3]
    assert np.flatnonzero(shares(torch.zeros(1, 9), 100, top_p=0.4)).tolist() == [0, 1, 2, 3]


def test_edge_values_mean_what_a_user_expects():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0, -1.0]])
    free = shares(logits, 1000).tolist()
    best = [0.0, 1.0, 0.0, 0.0, 0.0]
    for options in (dict(top_k=5), dict(top_k=6), dict(top_k=10**9), dict(top_p=1.0), dict(min_p=0.0)):
        assert shares(logits, 1000, **options).tolist() == free, options
    for options in (dict(top_k=1), dict(top_p=0.0), dict(temperature=0.0), dict(temperature=0.0, top_p=0.5)):
        assert shares(logits, 1000, **options).tolist() == best, options
    assert shares(logits, 1000, min_p=1.0).tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]
    for temperature in (1e-300, 1e-45, 1e-20):
        assert shares(logits, 1000, temperature=temperature).tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]
    assert shares(logits, 1000, temperature=1e300).tolist() == [0.2] * 5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=300), st.sampled_from([0.0, 0.5, ALMOST_ONE]))
def test_what_was_filtered_out_is_never_drawn(values, uniform):
    probabilities = torch.tensor([values])
    assume(probabilities.sum() > 1e-30)
    assert probabilities[0, inverse_cdf(probabilities, torch.tensor([uniform]))] > 0


def test_the_borders_between_tokens_belong_to_the_next_one():
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]])
    for uniform, token in ((0.0, 1), (0.2, 1), (0.25, 3), (0.5, 4), (ALMOST_ONE, 4)):
        assert inverse_cdf(probabilities, torch.tensor([uniform])).tolist() == [token]
    # Where a sum in another order ends a little lower, as on a GPU: not the last token, which was filtered out.
    assert inverse_cdf(probabilities, torch.tensor([1.0])).tolist() == [4]


def test_sampling_is_in_float32():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 1000, generator=generator).to(torch.bfloat16)
    uniforms, options = torch.rand(200, generator=generator), make_settings(top_p=0.9, temperature=0.9)
    assert torch.equal(choose(logits, uniforms, options), choose(logits.float(), uniforms, options))


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])  # flat: more than the first candidates; peaked: a few of them
@pytest.mark.parametrize("ties", [False, True])
def test_the_ids_are_those_of_a_stable_sort(spread, ties):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 5000, generator=generator) * spread
    if ties:
        logits = (logits * 4 / spread).round() * spread / 4
    order = logits.sort(dim=-1, descending=True, stable=True)
    expected = order.indices[:, :50].sort(-1).values
    assert torch.equal(top_ids(logits, 50), expected)
    assert [top_ids_of_row(row, 50).tolist() for row in logits.numpy()] == expected.tolist()
    probabilities = logits.softmax(-1)
    order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    expected = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order.indices, before < 0.9)
    assert torch.equal(nucleus(probabilities, 0.9), expected)


def test_rows_are_drawn_alike_alone_and_together_by_both_ways():
    generator = torch.Generator().manual_seed(5)
    logits, uniforms = torch.randn(16, 3000, generator=generator) * 4, torch.rand(16, generator=generator)
    seen = torch.rand(16, 3000, generator=generator) < 0.1
    for changes in (
        dict(),
        dict(top_k=40),
        dict(top_k=90, top_p=0.9),
        dict(top_p=0.8, min_p=0.05),
        dict(temperature=0),
    ):
        options = make_settings(repetition_penalty=1.3, **changes)
        together = choose(logits, uniforms, options, seen)
        assert torch.equal(choose_by_torch(logits, uniforms, options, seen), together)
        for row in range(16):
            one = slice(row, row + 1)
            assert torch.equal(choose(logits[one], uniforms[one], options, seen[one]), together[one])


def test_logits_that_are_not_finite_are_said_to_be():
    with pytest.raises(RunError, match="not finite"):
        choose(torch.full((1, 9), torch.nan), torch.zeros(1), make_settings(top_k=3))
