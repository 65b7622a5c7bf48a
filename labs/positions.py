"""Positions: learned, sinusoidal, RoPE, or none. Does a model without positions lose the order of tokens?

    python labs/positions.py

Measured: config/tiny.py (200 steps, characters of the standard library, 2 layers unless said), 3 seeds, which differ
by 0.013 on average. Last column: the change of the last logits if all tokens but the last are reversed, for each seed.

                   parameters  bits per byte  - baseline   reversed, %
    rope              121,152          3.271               5.99 5.77 8.46
    learned           125,248          3.565      +0.293   6.52 8.39 10.02
    sinusoidal        121,152          3.476      +0.205   6.88 20.64 15.08
    none              121,152          3.670      +0.399   3.76 5.28 1.91
    rope, 1 layer      67,712          3.406      +0.134   12.28 6.41 21.50
    none, 1 layer      67,712          3.730      +0.459   0.00

Conclusion: without positions a single layer sees only a set of tokens, so their order is lost. With two layers it is
not: through the causal mask a token can tell how many came before it (arXiv 2203.16634), and the next layer can use
that. This is learned slowly: in these few steps RoPE helps more than the second layer.
"""

from __future__ import annotations

from typing import Any

from lab import Variants, main

import torch

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
    """The relative change of the logits after a text if all tokens before its last one are reversed."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (8, min(32, model.config.block_size)), generator=generator)
    backwards = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), dim=1)
    before, after = (model(each)[0][:, -1] for each in (tokens, backwards))
    return float((after - before).norm() / before.norm())


MEASURES = {"reversed, %": lambda trained: f"{100 * order_effect(trained):.2f}"}


if __name__ == "__main__":
    main(__doc__ or "", __file__, VARIANTS, MEASURES)
