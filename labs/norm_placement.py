"""Where the norms stand: before each sublayer, after its sum (arXiv 1706.03762), or on what it adds (arXiv 2501.00656).

    python labs/norm_placement.py

TABLE
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from lab import Variants, main, model
from torch import Tensor


@dataclasses.dataclass
class GPTConfig(model.GPTConfig):
    placement: Literal["pre", "post", "output"] = "pre"  # where a block's two norms stand


class Block(model.Block):
    """model.Block with its norms in one of three places."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.placement = config.placement

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        if self.placement == "pre":
            return super().forward(x, *attention_inputs)
        if self.placement == "post":
            x = self.attention_norm(x + self.attention(x, *attention_inputs))
            return self.mlp_norm(x + self.mlp(x))
        x = x + self.attention_norm(self.attention(x, *attention_inputs))
        return x + self.mlp_norm(self.mlp(x))


# init=gpt2, since matrices that begin at zero ("modern") have no scale that a norm of the output could set.
COMMON: dict[str, Any] = dict(n_layer=6, init="gpt2", qk_norm=False)
VARIANTS: Variants = {
    "pre-norm": COMMON | dict(placement="pre"),
    "post-norm": COMMON | dict(placement="post"),
    "norm of the output": COMMON | dict(placement="output"),
}

if __name__ == "__main__":
    main(__file__, VARIANTS, Block=Block, GPTConfig=GPTConfig)
