"""Weights in 8 bits: each row of a matrix is integers times a scale of its own; the activations stay exact.

On a CPU kernels.c turns the integers to float32 as it reads them. Where that cannot be compiled, torch's 8-bit
instruction (AVX-512 VNNI) does the work. It multiplies 8-bit numbers only, so an activation is given to it in two
parts, x = size * (256 high + low), which together hold 16 bits: the rounding that this adds is some thousand times
smaller than the weights' own, and it is the same whatever else is in the batch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nib.cpu.build import MOST_ROWS, kernels
from nib.cpu.linear import many_rows, replace_linears

ROWS = 4096  # are quantised at a time
HIGHEST = 127  # the integers are symmetric, so that there is no zero point to multiply
SIXTEEN_BITS = 256 * HIGHEST
TINY, ZERO, PART = torch.tensor(1e-35), torch.tensor(0.0), torch.tensor(1 / 256)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) to integers (N, K) int8 and scales (N,) float32 with weight = integers * scales, rounded."""
    weight = weight.detach()
    low, high = weight.aminmax(dim=-1)
    scale = torch.maximum(-low.float(), high.float()).clamp_min_(1e-30) / HIGHEST
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for begin in range(0, len(weight), ROWS):  # an embedding is a third of a small model: no copy of all of it
        part = slice(begin, begin + ROWS)
        integers[part] = (weight[part] / scale[part, None]).round_()
    return integers, scale


class Int8Linear(nn.Module):
    """What was an nn.Linear: `weight` (N, K) int8 and `weight_scale` (N,)."""

    weight: Tensor | None
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.few_rows: Callable[[Tensor], Tensor] | None = None
        self.few = 0
        self.packed: object | None = None
        self.offset = ZERO

    def pack(self) -> None:
        """Make ready for products on the CPU, if it lies there; after this it can no longer be moved."""
        if self.weight is None or self.weight.device.type != "cpu":
            return
        if native := kernels():
            self.few_rows = native.linear(self.weight, self.weight_scale, self.bias)
            self.few = MOST_ROWS[torch.int8] * self.weight.shape[1]
        elif has_kernel():  # the matrix in the order of the processor's instructions instead of the plain one
            self.packed, self.weight = packed_matrix(self.weight, self.weight_scale), None
            self.offset = ZERO if self.bias is None else self.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        if self.few_rows is not None and x.numel() <= self.few:
            return self.few_rows(x.float()).to(x.dtype)
        if self.packed is not None:
            return self.in_two_parts(x, self.packed)
        assert self.weight is not None
        weight = self.weight * self.weight_scale[:, None]  # first: sums of integers go beyond float16
        if self.few_rows is not None:
            bias = None if self.bias is None else self.bias.float()
            return many_rows(x.float(), weight, bias).to(x.dtype)
        return F.linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def in_two_parts(self, x: Tensor, packed: object) -> Tensor:
        # Few operations, and numbers in tensors: between the kernels of a step each costs a microsecond or two.
        rows = x.reshape(-1, x.shape[-1]).float()  # (R, K)
        size = rows.abs().amax(-1, keepdim=True).add_(TINY)  # (R, 1), of SIXTEEN_BITS
        scaled = torch.addcdiv(ZERO, rows, size, value=SIXTEEN_BITS)
        high = torch.mul(scaled, PART).round_()
        parts = torch.cat((high, scaled.sub_(high, alpha=256)))  # (2R, K) within -128 and 128
        high, low = multiply(parts, packed).chunk(2)  # (R, N) each
        y = torch.addcmul(self.offset, low.add_(high, alpha=256), size, value=1 / SIXTEEN_BITS)
        return y.view(*x.shape[:-1], -1).to(x.dtype)


class Int8Embedding(nn.Module):
    """What was an nn.Embedding, of whose rows only those looked up become floating-point numbers."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.weight[tokens] * self.weight_scale[tokens][..., None]).to(self.dtype)


def multiply(x: Tensor, packed: object) -> Tensor:
    """Whole numbers x (R, K) from -128 to 127 times a packed matrix, to float32 (R, N); others are rounded to such."""
    return product()(x, 1.0, 128, packed)


@functools.cache
def product() -> Callable[..., Tensor]:
    """Looked up once: by its name a call took two microseconds more."""
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default


def packed_matrix(weight: Tensor, scale: Tensor) -> object:
    """Integers (N, K) and scales (N,) as torch's quantised kernels want them."""
    with warnings.catch_warnings():  # making such a tensor is deprecated; when it is gone, has_kernel() says so
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        made = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        return torch.ops.quantized.linear_prepack(made, None)


@functools.cache
def has_kernel() -> bool:
    """Whether this torch and processor multiply 8-bit numbers, and rightly.

    Without VNNI the sum of two products is cut to 16 bits; the largest numbers show it.
    """
    try:
        packed = packed_matrix(torch.full((16, 64), HIGHEST, dtype=torch.int8), torch.ones(16))
        for value in (127.0, -128.0):
            if (multiply(torch.full((2, 64), value), packed) != value * HIGHEST * 64).any():
                return False
    except (RuntimeError, AttributeError):
        return False
    return True


def quantize(model: Any, dtype: torch.dtype = torch.float32) -> None:
    """Quantize the matrices and the token embedding of a model to 8 bits, one by one; hidden states are of `dtype`.

    Biases, norms and positions, which are small, stay as they are.
    """

    def make(layer: nn.Linear) -> nn.Module:
        return Int8Linear(*quantize_rows(layer.weight), layer.bias)

    replace_linears(model, make)
    model.wte = Int8Embedding(*quantize_rows(model.wte.weight), dtype)


def pack_int8(model: Any) -> None:
    """Make a quantised model ready to run: a tied head gets its matrix, and all are packed."""
    if model.head is None:
        model.head = Int8Linear(model.wte.weight, model.wte.weight_scale, None)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.pack()
