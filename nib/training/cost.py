"""What a model costs: its parameters, and the operations to train on a token."""

from __future__ import annotations

from typing import Any

from torch import nn


def num_parameters(model: nn.Module, trained: bool = False) -> int:
    """The number of parameters, or of those that are `trained`; a tied head is counted once."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)


def flops_per_token(model: nn.Module, length: int = 0) -> int:
    """Floating-point operations to train on one token of a sequence of `length` (0: block_size) positions.

    6N for the N weights in matrix products, so without embeddings that are only looked up, 4 for one that is not
    trained, plus 12 n_layer H D length
    for attention. By convention the causal mask does not halve that (arXiv 2204.02311, appendix B).
    """
    config: Any = model.config
    looked_up = [] if config.tie_weights else [model.get_parameter("wte.weight")]
    looked_up += [model.get_parameter("wpe.weight")] if config.position == "learned" else []
    seen = min(length or config.block_size, config.window or config.block_size)
    attention = 12 * config.n_layer * config.n_head * config.head_size * seen
    looked_up += [each for each in model.parameters() if each.ndim < 2 and not each.requires_grad]
    multiplied = set(model.parameters()) - set(looked_up)
    return sum((6 if each.requires_grad else 4) * each.numel() for each in multiplied) + attention
