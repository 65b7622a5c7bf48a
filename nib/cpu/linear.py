"""Faster float32 linear layers for sampling on a CPU, with the same results.

For one to eight rows of input torch calls the general matmul, which reads the matrix at a fraction of the memory
bandwidth. kernels.c reads it at full bandwidth; if it cannot be compiled, torch's own layers stay. Measurements are in
bench/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nib.cpu.build import MOST_ROWS, Kernels, check_factor, kernels


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in float32 on the CPU, with oneDNN if torch has it: twice as fast as MKL on an AMD processor."""
    check_factor(x, weight.shape[1])
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class RowsLinear(nn.Module):
    """A float32 nn.Linear on the CPU that uses kernels.c for few rows."""

    def __init__(self, native: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().contiguous(), requires_grad=False), bias
        self.few_rows, self.few = native.linear(self.weight, None, bias), MOST_ROWS[torch.float32] * weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.few_rows(x) if x.numel() <= self.few else many_rows(x, self.weight, self.bias)


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every plain nn.Linear by `make(layer)`, one at a time; each old matrix is freed before the next."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # a subclass may compute something else
                setattr(parent, name, make(child))


def pack_linears(model: nn.Module) -> bool:
    """Use kernels.c for the linear layers of a float32 model on the CPU, with a tied head. Returns whether it does."""
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not (native := kernels()):
        return False
    replace_linears(model, lambda layer: RowsLinear(native, layer.weight, layer.bias))
    if model.head is None:
        model.head = RowsLinear(native, model.wte.weight, None)
    return True
