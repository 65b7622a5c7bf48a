"""Float32 weights for sampling on a CPU: the layers compute what they did, only faster.

torch calls the general matrix product for one or eight rows of input, which reads a matrix at a fraction of the
memory's speed. kernels.c reads it as fast as the memory allows; where that cannot be compiled, oneDNN does nearly so
once the matrix lies in the order that it likes. What was measured is in bench/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nib.cpu.build import MOST_ROWS, Kernels, check_factor, kernels

ROWS = 64  # the layout is chosen for this many rows; it was measured to be good for 1, 8 and 512 as well


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


class PackedLinear(nn.Module):
    """An nn.Linear in float32 on the CPU whose matrix (N, K) was packed; it can no longer be trained or saved."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises RuntimeError or AttributeError where this torch has no oneDNN."""
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = bias
        self.product = torch.ops.mkldnn._linear_pointwise.default

    @property
    def weight(self) -> Tensor:
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.packed, self.bias, "none", [], "")


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put `make(layer)` in the place of every plain nn.Linear, one at a time: each old matrix is freed by then."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # a subclass may compute something else
                setattr(parent, name, make(child))


def pack_linears(model: nn.Module) -> bool:
    """Make the matrices of a float32 model on the CPU ready for sampling, a tied head included; False: it cannot be.

    Without the kernels a tied head takes its memory twice: the embedding itself stays in rows, to be looked up.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return False
    native = kernels()
    if native is None and not has_packing():
        return False

    def make(weight: Tensor, bias: Tensor | None) -> nn.Module:
        return PackedLinear(weight, bias) if native is None else RowsLinear(native, weight, bias)

    replace_linears(model, lambda layer: make(layer.weight, layer.bias))
    if model.head is None:
        model.head = make(model.wte.weight, None)
    return True


def has_packing() -> bool:
    """Whether this torch was built with oneDNN's operators."""
    try:
        PackedLinear(torch.zeros(2, 2), None)(torch.zeros(1, 2))
    except (RuntimeError, AttributeError):
        return False
    return torch.backends.mkldnn.is_available()
