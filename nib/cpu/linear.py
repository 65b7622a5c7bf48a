"""Faster linear layers for sampling on a CPU: float32 activations times matrices of float32 or bfloat16.

For one to eight rows of input torch calls the general matmul, which reads the matrix at a fraction of the memory
bandwidth. kernels.c reads it at full bandwidth; if it cannot be compiled, torch's own layers stay. Matrices in bfloat16
are half as large, and are converted to float32 as they are read, which is exact. Measurements are in bench/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nib.cpu.build import Kernels, check_factor, kernels


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in float32 on the CPU, with oneDNN if torch has it: twice as fast as MKL on an AMD processor."""
    check_factor(x, weight.shape[1])
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class RowsLinear(nn.Module):
    """Replaces an nn.Linear: `weight` (N, K) float32 or bfloat16, x and the result float32; kernels.c for few rows."""

    weight: Tensor

    def __init__(self, native: Kernels, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().contiguous())
        self.bias = bias
        self.few_rows = native.linear(self.weight, None, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.few_rows(x) if x.numel() <= self.few_rows.few else many_rows(x, self.weight.float(), self.bias)


class Bfloat16Embedding(nn.Module):
    """Replaces an nn.Embedding by a table in bfloat16, whose rows are looked up in float32."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().to(torch.bfloat16, copy=True))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].float()


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


def pack_bfloat16(model: Any, native: Kernels) -> None:
    """Round the matrices and the token embedding of a model on the CPU to bfloat16, one by one, and use kernels.c.

    All other parameters are to be float32.
    """
    replace_linears(model, lambda layer: RowsLinear(native, layer.weight.to(torch.bfloat16, copy=True), layer.bias))
    model.wte = Bfloat16Embedding(model.wte.weight)
    if model.head is None:
        model.head = RowsLinear(native, model.wte.weight, None)
