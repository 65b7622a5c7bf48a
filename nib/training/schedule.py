"""The learning-rate schedule, as a factor of the peak rate."""

from __future__ import annotations

import math


def warmup_factor(step: int, warmup_iters: int) -> float:
    """Rises from 1/(warmup_iters + 1) at step 0 to 1 at step warmup_iters."""
    return min(1.0, (step + 1) / (warmup_iters + 1))


def decay_factor(schedule: str, progress: float, decay_fraction: float, floor: float) -> float:
    """From 1 to `floor` as `progress` through the run goes from 0 to 1.

    cosine (arXiv 1608.03983) and linear fall from the start; wsd (arXiv 2405.18392) falls linearly in the last
    `decay_fraction` of the run; constant does not fall.
    """
    progress = min(1.0, max(0.0, progress))
    if schedule == "cosine":
        height = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule == "linear":
        height = 1 - progress
    elif schedule == "wsd":
        height = min(1.0, (1 - progress) / decay_fraction)
    else:
        return 1.0
    return floor + (1 - floor) * height


def rate_factor(
    step: int, steps: int, seconds: float, max_seconds: float, *,
    schedule: str, warmup_iters: int, decay_fraction: float, floor: float,
) -> float:  # fmt: skip
    """The factor for step `step` of `steps` after `seconds` of `max_seconds` (steps and max_seconds 0: no limit).

    If the number of steps is known, progress counts from the end of the warm-up, except for wsd, whose
    `decay_fraction` is a share of the whole run. The larger of the progress in steps and in seconds counts, so that the
    rate has fallen when either ends the run.
    """
    begin = 0 if schedule == "wsd" else warmup_iters
    progress = (step - begin) / max(1, steps - begin) if steps else 0.0
    if max_seconds:
        progress = max(progress, seconds / max_seconds)
    return warmup_factor(step, warmup_iters) * decay_factor(schedule, progress, decay_fraction, floor)


def finished(step: int, steps: int, seconds: float, max_seconds: float) -> bool:
    return bool((steps and step >= steps) or (max_seconds and seconds >= max_seconds))
