"""What a model costs: its parameters, and the operations to train on a token."""

from __future__ import annotations

from typing import Any

from torch import nn


def num_parameters(model: nn.Module) -> int:
    """The number of trained parameters; a tied head is counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(model: nn.Module, length: int = 0) -> int:
    """Floating-point operations to train on one token of a sequence of `length` (0: block_size) positions.

    6N for the N weights in matrix products, so without embeddings that are only looked up, plus 12 n_layer H D length
    for attention. By convention the causal mask does not halve that (arXiv 2204.02311, appendix B).
    """
    config: Any = model.config
    looked_up = [] if config.tie_weights else [model.get_parameter("wte.weight")]
    looked_up += [model.get_parameter("wpe.weight")] if config.position == "learned" else []
    seen = min(length or config.block_size, config.window or config.block_size)
    attention = 12 * config.n_layer * config.n_head * config.head_size * seen
    return 6 * (num_parameters(model) - sum(each.numel() for each in looked_up)) + attention
