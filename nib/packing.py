"""Float32 weights in the order in which oneDNN reads them: the layers stay what they are, only faster on a CPU.

torch leaves float32 matrices in rows and calls the general matrix product for one or eight rows of input, which
reads them at a fraction of the memory's speed. What was measured is in bench/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

ROWS = 64  # the layout is chosen for this many rows; it was measured to be good for 1, 8 and 512 as well


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
    """Pack the matrices of a float32 model on the CPU, the head tied to the embedding included; False: it cannot be.

    The embedding itself stays in rows, to be looked up, so that a tied head takes its memory twice.
    """
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    try:
        PackedLinear(torch.zeros(2, 2), None)(torch.zeros(1, 2))
    except (RuntimeError, AttributeError):  # a torch built without these operators
        return False
    replace_linears(model, lambda layer: PackedLinear(layer.weight, layer.bias))
    if model.head is None:
        model.head = PackedLinear(model.wte.weight, None)
    return True
