"""Positions: learned, sinusoidal, RoPE, or none. Is order really lost without them?

    python labs/positions.py

TABLE
"""

from __future__ import annotations

from typing import Any

import torch
from lab import Variants, main

VARIANTS: Variants = {
    "rope": dict(position="rope"),
    "learned": dict(position="learned"),
    "sinusoidal": dict(position="sinusoidal"),
    "none": dict(position="none"),
    "rope, 1 layer": dict(position="rope", n_layer=1),
    "none, 1 layer": dict(position="none", n_layer=1),
}


@torch.no_grad()
def order_effect(model: Any) -> float:
    """How far the logits after a text move, of their size, when all tokens before its last one are put backwards."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (8, min(32, model.config.block_size)), generator=generator)
    backwards = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    before, after = (model(each)[0][:, -1] for each in (tokens, backwards))
    return float((after - before).norm() / before.norm())


def notes(model: Any) -> str:
    return f"reversing the text moves the logits by {100 * order_effect(model):.4f} %"


if __name__ == "__main__":
    main(__file__, VARIANTS, notes)
