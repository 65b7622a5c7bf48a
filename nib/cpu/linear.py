"""Float32 weights for sampling on a CPU: the layers compute what they did, only faster.

torch calls the general matrix product for one or eight rows of input, which reads a matrix at a fraction of the
memory's speed. kernels.c reads it as fast as the memory allows; where that cannot be compiled, torch's own layers stay.
What was measured is in bench/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nib.cpu.build import MOST_ROWS, Kernels, check_factor, kernels


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in float32 on the CPU, by oneDNN where torch has it: twice as fast as MKL on an AMD processor."""
    check_factor(x, weight.shape[1])
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class RowsLinear(nn.Module):
    """An nn.Linear in float32 on the CPU whose matrix (N, K) is read where it lies when few rows come."""

    def __init__(self, native: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().contiguous(), requires_grad=False), bias
        self.few_rows, self.few = native.linear(self.weight, None, bias), MOST_ROWS[torch.float32] * weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.few_rows(x) if x.numel() <= self.few else many_rows(x, self.weight, self.bias)


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `make(layer)` in the place of every plain nn.Linear, one at a time: each old matrix is freed by then."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # a subclass may compute something else
                setattr(parent, name, make(child))


def pack_linears(model: nn.Module) -> bool:
    """Let kernels.c do the products of a float32 model on the CPU, a tied head's included; whether it does now."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not (native := kernels()):
        return False
    replace_linears(model, lambda layer: RowsLinear(native, layer.weight, layer.bias))
    if model.head is None:
        model.head = RowsLinear(native, model.wte.weight, None)
    return True
