"""From logits to the next token. Letters: B rows of the batch, V vocabulary, N candidates (V, or top_k)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nib.samples import SamplingSettings


def choose(logits: Tensor, uniforms: Tensor, settings: SamplingSettings, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V) and a uniform number in [0, 1) for each row (B,) to the next tokens (B,).

    In this order, as transformers does it: the repetition penalty on the tokens that are `seen` (B, V), the
    temperature, top-k, top-p of what is left, min-p. Then the token is where the cumulative distribution passes
    the uniform number, with tokens in the order of their ids: a rounding error in a logit moves that border by as
    little, where in the order of probability it could swap two tokens.

    Every operation is row by row and none waits for the device.
    """
    logits = logits.float()
    if seen is not None:
        logits = penalise(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0 or settings.top_k == 1:
        return logits.argmax(-1)  # the lowest id where several are best
    ids = None
    if 0 < settings.top_k < logits.shape[-1]:
        ids = top_ids(logits, settings.top_k)
        logits = logits.gather(-1, ids)  # (B, N)
    # The best first becomes 0, so that no division overflows; nor is one by a number that float32 takes for 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(settings.temperature, 1e-30)
    probabilities = logits.softmax(-1)  # (B, N)
    if settings.top_p < 1:
        probabilities = probabilities * nucleus(probabilities, settings.top_p)
    if settings.min_p > 0:
        probabilities = probabilities * (probabilities >= settings.min_p * probabilities.amax(-1, keepdim=True))
    chosen = inverse_cdf(probabilities, uniforms)
    return chosen if ids is None else ids.gather(-1, chosen[:, None])[:, 0]


def eager_cpu(x: Tensor) -> bool:
    """Whether values may be looked at: the CPU has them at hand, and this is no step that is being compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (arXiv 1909.05858) as transformers applies it: away from the sign of the logit."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def largest(values: Tensor, count: Tensor | int, smallest: Tensor) -> Tensor:
    """A mask (B, N) of the `count` largest values of each row, the last of which is `smallest` (B, 1).

    Of equal values those of the lowest index are taken, so that there are exactly `count`.
    """
    above, tied = values > smallest, values == smallest
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= count - above.sum(-1, keepdim=True)))


def top_ids(logits: Tensor, k: int) -> Tensor:
    """The ids (B, k), ascending, of the k largest of the logits (B, V)."""
    if eager_cpu(logits):  # numpy partitions 50,000 numbers in less than half of topk's time
        rows = logits.numpy()
        border = np.partition(rows, -k, axis=-1)[:, -k, None]
        found = [row.nonzero()[0] for row in rows >= border]
        if all(len(ids) == k for ids in found):
            return torch.from_numpy(np.stack(found))
        smallest = torch.from_numpy(border)
    else:
        smallest = logits.topk(k).values[:, -1:]
    # There are several equal ones at the border.
    kept = largest(logits, k, smallest)
    rank = torch.arange(1, k + 1, device=logits.device, dtype=torch.int32).repeat(len(logits), 1)
    return torch.searchsorted(kept.cumsum(-1, dtype=torch.int32), rank)  # the r-th kept is where the count reaches r


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """A mask (B, N) of the fewest largest probabilities with a sum of at least top_p (arXiv 1904.09751), never none."""
    if eager_cpu(probabilities):  # numpy sorts 50,000 numbers in a tenth of torch's 3 ms
        descending = torch.from_numpy(-np.sort(-probabilities.numpy(), axis=-1))
    else:
        descending = probabilities.sort(-1, descending=True).values
    before = descending.cumsum(-1) - descending  # what the larger ones have together
    count = (before < top_p).sum(-1, keepdim=True).clamp_min(1)
    return largest(probabilities, count, descending.gather(-1, count - 1))


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first index (B,) up to which a row's share of the probabilities (B, N) is more than its uniform (B,)."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True).clamp_max(probabilities.shape[-1] - 1)
    # A GPU sums in parts and may round a sum of the same terms up and down: never take what was filtered out.
    possible = probabilities.gather(-1, chosen) > 0
    return torch.where(possible, chosen, probabilities.argmax(-1, keepdim=True))[:, 0]


def row_generator(seed: int, number: int, prompt: Sequence[int]) -> np.random.Generator:
    """The uniform numbers of sample `number` of a prompt (token ids): its own stream, whatever else is in the batch.

    The prompt is part of the seed, or else the same numbers would meet similar distributions in a batch of
    prompts, and their samples would end at the same steps. PCG64 through numpy's SeedSequence takes it all;
    torch's CPU generator uses 32 bits of its seed.
    """
    return np.random.Generator(np.random.PCG64([seed, number, *prompt]))
