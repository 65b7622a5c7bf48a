"""8-bit weights: each row of a matrix is stored as int8 with its own scale; activations are not quantized.

On a CPU kernels.c converts the integers to float32 as it reads them. Without kernels.c, and on GPUs, a whole matrix is
dequantized for each matmul, which saves memory but no time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nib.cpu.build import Linear, kernels
from nib.cpu.linear import many_rows, replace_linears

ROWS = 4096  # quantized at a time
HIGHEST = 127  # symmetric quantization, without a zero point


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) to integers (N, K) int8 and scales (N,) float32, so that weight is about integers * scales."""
    weight = weight.detach()
    low, high = weight.aminmax(dim=-1)
    scale = torch.maximum(-low.float(), high.float()).clamp_min_(1e-30) / HIGHEST
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, len(weight), ROWS):  # avoids a copy of the whole embedding, a third of a small model
        part = slice(begin, begin + ROWS)
        integers[part] = (weight[part] / scale[part, None]).round_()
    return integers, scale


class Int8Linear(nn.Module):
    """Replaces an nn.Linear: `weight` (N, K) int8 and `weight_scale` (N,)."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = bias
        self.few_rows: Linear | None = None

    def pack(self) -> None:
        """Prepare for kernels.c if the layer is on the CPU. After this it must not be moved."""
        if self.weight.device.type == "cpu" and (native := kernels()):
            self.few_rows = native.linear(self.weight, self.weight_scale, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.few_rows is not None and x.numel() <= self.few_rows.few:
            return self.few_rows(x.float()).to(x.dtype)
        weight = self.weight * self.weight_scale[:, None]  # before the matmul: sums of integers overflow float16
        if self.few_rows is not None:
            bias = None if self.bias is None else self.bias.float()
            return many_rows(x.float(), weight, bias).to(x.dtype)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class Int8Embedding(nn.Module):
    """Replaces an nn.Embedding; only the rows that are looked up are dequantized."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.weight[tokens] * self.weight_scale[tokens][..., None]).to(self.dtype)


def quantize(model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Quantize the matrices and the token embedding of a model to 8 bits, one by one; hidden states have `dtype`.

    Biases, norms and position tables, which are small, are not quantized.
    """
    replace_linears(model, lambda layer: Int8Linear(*quantize_rows(layer.weight), layer.bias))
    model.wte = Int8Embedding(*quantize_rows(model.wte.weight), dtype)


def pack_int8(model: Any) -> None:
    """Prepare a quantized model for sampling: make a head if it was tied, and pack all layers."""
    if model.head is None:
        model.head = Int8Linear(model.wte.weight, model.wte.weight_scale, None)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.pack()
