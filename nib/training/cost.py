"""What a model costs, by part: its parameters, and the FLOPs to train on a token."""

from __future__ import annotations

from typing import Any

from torch import nn


def part_of(model: nn.Module, parameter_name: str) -> str:
    """The part of the model that a parameter belongs to, by the type and path of its module."""
    place = parameter_name.rpartition(".")[0]
    module = model.get_submodule(place)
    if isinstance(module, nn.RMSNorm | nn.LayerNorm):
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings"
    parts = {"attention": "attention", "mlp": "feed_forward", "head": "head"}
    return next((parts[each] for each in place.split(".") if each in parts), "rest")


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """The number of parameters of each part; a tied head has none of its own."""
    found = dict.fromkeys(("embeddings", "attention", "feed_forward", "norms"), 0)
    for name, parameter in model.named_parameters():
        part = part_of(model, name)
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def num_parameters(model: nn.Module, trained: bool = False) -> int:
    """The number of parameters, or of those that are `trained`; a tied head is counted once."""
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)


def flops_by_part(model: nn.Module, length: int = 0) -> dict[str, int]:
    """Floating-point operations of the matrix products to train on one token of a sequence of `length` positions.

    6 for each weight of a matrix: 2 forward and 4 backward (2 if the weight is frozen). `scores` are the products of
    queries with keys and of weights with values: 12 n_layer H D length. By convention (arXiv 2204.02311, appendix B)
    the causal mask does not halve them, a window shortens them, and what a fused kernel recomputes is counted once.
    length 0: block_size.
    """
    config: Any = model.config
    seen = min(length or config.block_size, getattr(config, "window", 0) or config.block_size)
    scores = 12 * config.n_layer * config.n_head * config.head_size * seen
    found = {"attention": 0, "scores": scores, "feed_forward": 0, "head": 0}
    for name, parameter in model.named_parameters():
        part = "head" if name == "wte.weight" and config.tie_weights else part_of(model, name)
        if parameter.ndim > 1 and part != "embeddings":
            found[part] = found.get(part, 0) + (6 if parameter.requires_grad else 4) * parameter.numel()
    return found


def flops_per_token(model: nn.Module, length: int = 0) -> int:
    """The sum of `flops_by_part`."""
    return sum(flops_by_part(model, length).values())
