"""From logits to the next token. Letters: B rows of the batch, V vocabulary, N candidates (V, or top_k).

Two implementations: numpy on the CPU, where an operation on so few numbers takes a fifth of torch's time, and torch
elsewhere, without synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nib.common.exits import RunError
from nib.generation.request import SamplingSettings

LEAST = 1e-30  # the lowest temperature that is used: float32 rounds much lower ones to 0


def choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings, seen: Tensor | None = None) -> Tensor:
    """The next tokens (B,), from logits (B, V) and a uniform number in [0, 1) for each row (B,).

    In this order, as in transformers: the repetition penalty on the tokens that are `seen` (B, V), the temperature,
    top-k, top-p of what is left, min-p. The token is the one at which the cumulative distribution passes the uniform
    number, with tokens in the order of their ids: then a rounding error in a logit moves a border only a little. In
    the order of probability it could swap two tokens.

    Rows do not affect each other. Raises RunError for logits that are not finite, where that is checked.
    """
    # Without top-k and top-p torch is faster. A step that is being compiled cannot look at values.
    few = 0 < settings.top_k < logits.shape[-1] or settings.top_p < 1
    if logits.device.type != "cpu" or not few or torch.compiler.is_compiling():
        return choose_by_torch(logits.float(), uniforms, settings, seen)
    rows, marked = logits.float().numpy(), None if seen is None else seen.numpy()
    return torch.from_numpy(choose_by_numpy(rows, uniforms.numpy(), settings, marked))


def choose_by_torch(logits: Tensor, uniforms: Tensor, settings: SamplingSettings, seen: Tensor | None) -> Tensor:
    if seen is not None:
        logits = penalise(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0 or settings.top_k == 1:
        return logits.argmax(-1)  # the lowest id of equal ones
    ids = None
    if 0 < settings.top_k < logits.shape[-1]:
        ids = top_ids(logits, settings.top_k)
        logits = logits.gather(-1, ids)  # (B, N)
    # The largest logit becomes 0, so that no quotient is +inf; LEAST avoids a division by 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(settings.temperature, LEAST)
    probabilities = logits.softmax(-1)  # (B, N)
    if settings.top_p < 1:
        probabilities = probabilities * nucleus(probabilities, settings.top_p)
    if settings.min_p > 0:
        probabilities = probabilities * (probabilities >= settings.min_p * probabilities.amax(-1, keepdim=True))
    chosen = inverse_cdf(probabilities, uniforms)
    return chosen if ids is None else ids.gather(-1, chosen[:, None])[:, 0]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (arXiv 1909.05858), as in transformers: divides positive logits, multiplies others."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def largest(values: Any, count: Any, smallest: Any) -> Any:
    """A mask (..., N) of the `count` largest values of each row; `smallest` (..., 1) is the smallest of these.

    Of equal values those with the lowest index are taken, so that there are exactly `count`. For numpy and torch.
    """
    above, tied = values > smallest, values == smallest
    return above | (tied & (tied.cumsum(-1) <= count - above.sum(-1)[..., None]))


def top_ids(logits: Tensor, k: int) -> Tensor:
    """The ids (B, k), ascending, of the k largest of the logits (B, V)."""
    kept = largest(logits, k, logits.topk(k).values[:, -1:])  # topk takes any of several equal ones
    rank = torch.arange(1, k + 1, device=logits.device, dtype=torch.int32).repeat(len(logits), 1)
    return torch.searchsorted(kept.cumsum(-1, dtype=torch.int32), rank)  # the r-th kept is where the count reaches r


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """A mask (B, N) of the fewest largest probabilities that sum to at least top_p (arXiv 1904.09751), at least one."""
    descending = probabilities.sort(-1, descending=True).values
    before = descending.cumsum(-1) - descending  # the sum of the larger ones
    count = (before < top_p).sum(-1, keepdim=True).clamp_min(1)
    return largest(probabilities, count, descending.gather(-1, count - 1))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first index (B,) up to which a row's share of the probabilities (B, N) is more than its uniform (B,)."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).clamp_max(probabilities.shape[-1] - 1)
    # A GPU's cumulative sum may not be monotonic after rounding: never take a token that was filtered out.
    possible = probabilities.gather(-1, chosen) > 0
    return torch.where(possible, chosen, probabilities.argmax(-1, keepdim=True))[:, 0]


@np.errstate(over="ignore")
def choose_by_numpy(
    logits: np.ndarray, uniforms: np.ndarray, settings: SamplingSettings, seen: np.ndarray | None
) -> np.ndarray:
    row, ids = np.arange(len(logits))[:, None], None
    if seen is not None:
        penalty = settings.repetition_penalty
        logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
    if settings.temperature == 0 or settings.top_k == 1:
        return logits.argmax(-1)
    if 0 < settings.top_k < logits.shape[-1]:
        ids = np.stack([top_ids_of_row(each, settings.top_k) for each in logits])
        logits = logits[row, ids]  # (B, N)
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / max(settings.temperature, LEAST))  # the best is 1
    if settings.top_p < 1:
        descending = -np.sort(-weights, axis=-1)
        cumulative = descending.cumsum(-1, dtype=np.float64)
        count = (cumulative - descending < settings.top_p * cumulative[:, -1:]).sum(-1, keepdims=True).clip(1)
        weights = weights * largest(weights, count, descending[row, count - 1])
    if settings.min_p > 0:
        weights = weights * (weights >= settings.min_p)
    cumulative = weights.cumsum(-1, dtype=np.float64)
    chosen = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(-1)
    return chosen if ids is None else ids[row[:, 0], chosen]


def top_ids_of_row(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids (k,), ascending, of the k largest of the logits (V,); of equal logits those with the lowest ids."""
    border = np.partition(logits, -k)[-k]
    (ids,) = (logits >= border).nonzero()
    if len(ids) > k:
        ids = ids[largest(logits[ids], k, border)]
    if len(ids) < k:
        raise RunError("the model's logits are not finite: its training diverged. Use an earlier checkpoint")
    return ids


def row_generator(seed: int, number: int, prompt: Sequence[int]) -> np.random.Generator:
    """The random generator of sample `number` of a prompt (token ids), independent of the rest of the batch.

    The prompt is part of the seed. Otherwise the samples of different prompts would use the same uniform numbers, and
    would tend to end at the same steps. numpy's SeedSequence takes seeds of any length; torch's CPU generator uses
    only 32 bits of its seed.
    """
    return np.random.Generator(np.random.PCG64([seed, number, *prompt]))
