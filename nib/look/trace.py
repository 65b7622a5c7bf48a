"""Record from outside what happens inside a model: model.py has no code for this and may be changed.

Attention weights are recomputed from the arguments of scaled_dot_product_attention and checked against its result.
Hidden states are the inputs and outputs of the blocks. Letters: T tokens, H heads, C channels, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-4  # of the largest number: reordered float32 sums differ by 1e-6, real differences by more than this


@dataclass
class BlockCall:
    """One call of a block: the residual stream before and after it (T, C), and what its parts returned."""

    before: Tensor
    after: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)  # attention, mlp: summed over their calls
    maps: list[Tensor] = field(default_factory=list)  # attention weights (H, T, S), of each call
    error: float = 0.0  # of weights times values, relative to the largest number that attention returned


class Trace(TorchFunctionMode):
    """In a `with`, records every call of one of the model's blocks as a BlockCall; the batch has one text."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.calls, self.inside = model, [], False  # type: ignore[var-annotated]
        self.final: tuple[Tensor, Tensor] | None = None  # the last norm's input and output

    def __enter__(self) -> Any:
        self.hooks = []
        for block in dict.fromkeys(getattr(self.model, "blocks", ())):
            self.hooks += [
                block.register_forward_pre_hook(self.begin_block, with_kwargs=True),
                block.register_forward_hook(self.end_block),
            ]
            for name in ("attention", "mlp"):
                if isinstance(part := getattr(block, name, None), nn.Module):
                    self.hooks.append(part.register_forward_hook(partial(self.end_part, name)))
        if isinstance(norm := getattr(self.model, "norm", None), nn.Module):
            self.hooks.append(norm.register_forward_hook(self.end_norm))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def begin_block(self, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inside = True
        self.calls.append(BlockCall(rows(next(each for each in (*arguments, *named.values())))))

    def end_block(self, block: nn.Module, arguments: Any, result: Any) -> None:
        self.inside = False
        self.calls[-1].after = rows(result)

    def end_part(self, name: str, part: nn.Module, arguments: Any, result: Any) -> None:
        if self.inside:
            parts = self.calls[-1].parts
            parts[name] = parts[name] + rows(result) if name in parts else rows(result)

    def end_norm(self, norm: nn.Module, arguments: Any, result: Any) -> None:
        self.final = rows(arguments[0]), rows(result)

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = function(*arguments, **(named or {}))
        if function is F.scaled_dot_product_attention and self.inside:
            call, returned = self.calls[-1], flat(result)
            weights, mixed = attend(*arguments, **(named or {}))
            call.maps.append(weights.float())
            difference = (mixed - returned).abs().max() / returned.abs().max().clamp_min(1e-30)
            call.error = max(call.error, float(difference.nan_to_num(1.0)))
        return result


def rows(x: Any) -> Tensor:
    """Hidden states (T, C) of a batch of one, or the first of several results."""
    x = x[0] if isinstance(x, tuple) else x
    return x.detach()[0].cpu().double()


def flat(x: Tensor) -> Tensor:
    """(1, heads, T, D) to (heads, T, D)."""
    return x.detach().cpu().double().flatten(0, -3)


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weights (H, T, S) of scaled_dot_product_attention and its result (H, T, D), as it is documented."""
    shape = (*query.shape[:-1], key.shape[-2])
    q, k, v = flat(query), flat(key), flat(value)
    k, v = (each.repeat_interleave(q.shape[0] // each.shape[0], 0) for each in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(torch.ones(shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if attn_mask is not None:
        mask = attn_mask.detach().cpu().broadcast_to(shape).flatten(0, -3)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    weights = scores.softmax(-1).nan_to_num()  # a query whose keys are all masked has weights of 0
    return weights, weights @ v
