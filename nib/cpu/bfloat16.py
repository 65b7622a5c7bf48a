"""Training in bfloat16 on a CPU: where it pays, attention in less time, and linear layers in less memory.

torch's own attention takes two fifths of a bfloat16 training step of GPT-2's shape at 1,024 positions, and is no faster
than in float32. Batched matmuls of a block of queries with all keys before it take half of its time.

Under torch's autocast all 16-bit copies of weights stay in memory until the backward pass. Here each is made when it is
needed, twice per micro-batch, which takes about a hundredth of a step of a thousand tokens. Likewise the result of gelu
is computed again instead of kept.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 256  # queries at a time: the fastest of 64, 128, 256 and 512 at 512 and at 1024 positions (bench/NOTES.md)
# The least n_embd of models that are trained in bfloat16 if dtype is auto. Narrower ones gain less (bench/NOTES.md).
LEAST_WIDTH = 512
_library: torch.library.Library | None = None  # the kernels stay registered as long as this exists


def has_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 matmuls (AVX512-BF16 or AMX), which oneDNN then uses."""
    kinds = (getattr(torch.cpu, f"_is_{kind}_supported", lambda: False) for kind in ("avx512_bf16", "amx_tile"))
    return torch.backends.mkldnn.is_available() and any(supported() for supported in kinds)


def replace_autocast_operations() -> None:
    """In this process, use `attention`, `linear` and `gelu` under autocast on a CPU. Elsewhere torch's own remain."""
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the one about replacing a kernel
            _library.impl("scaled_dot_product_attention", attention, "AutocastCPU")
            _library.impl("linear", linear, "AutocastCPU")
            _library.impl("gelu", gelu, "AutocastCPU")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As F.linear under autocast, for floating-point inputs. Second derivatives raise a RuntimeError."""
    dtype = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        if torch.float64 in (x.dtype, weight.dtype):
            return F.linear(x, weight, bias)
        x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
        if dtype == torch.bfloat16 and weight.dtype == torch.float32 and torch.is_grad_enabled():
            return Linear.apply(x, weight, bias, getattr(x, "gelu_of", None))
        return F.linear(x, weight.to(dtype), bias)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """As F.gelu under autocast. The result has an attribute `gelu_of`, which holds x.

    If the result is the input of `linear`, that saves x for its backward pass, and there computes gelu again.
    """
    with torch.autocast("cpu", enabled=False):
        y = F.gelu(x, approximate=approximate)
    if torch.is_grad_enabled() and not x.is_inference():
        y.gelu_of = (x.detach(), approximate, x._version, y._version)  # type: ignore[attr-defined]  # our own
    return y


class Linear(torch.autograd.Function):
    """x (..., inputs) in bfloat16 times a float32 weight (outputs, inputs), which each pass rounds to bfloat16.

    gelu_of: None, or for an x that is gelu(h): h, gelu's `approximate`, and the versions of h and of x at that time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu_of: Any) -> Tensor:
        ctx.approximate, kept = None, x if ctx.needs_input_grad[1] else None
        if kept is not None and gelu_of and gelu_of[2:] == (gelu_of[0]._version, x._version):  # none changed in place
            kept, ctx.approximate, *_ = gelu_of
        ctx.save_for_backward(kept, weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x, grad_weight, grad_bias = None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.to(grad.dtype)).view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            x = F.gelu(x, approximate=ctx.approximate) if ctx.approximate else x
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """As F.scaled_dot_product_attention under autocast."""
    dtype = torch.get_autocast_dtype("cpu")
    q, k, v = (each.to(dtype) if each.dtype != torch.float64 else each for each in (q, k, v))
    plain = causal and mask is None and not dropout and q.ndim == 4 and q.shape[2] == k.shape[2] and q.numel() > 0
    heads = q.shape[:2] == k.shape[:2] or (enable_gqa and q.shape[1] % k.shape[1] == 0)
    with torch.autocast("cpu", enabled=False):
        if plain and heads and q.dtype == torch.bfloat16 and k.shape[1] == v.shape[1] and k.shape[0] == q.shape[0]:
            return CausalAttention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa)


class CausalAttention(torch.autograd.Function):
    """Attention of q (B, H, T, D) to k and v (B, K, T, D), each shared by G = H / K heads.

    The scores are rounded to bfloat16, and the softmax is computed in float32. Only q, k and v are saved for the
    backward pass, which computes the softmax again.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)  # views of one tensor: contiguous copies would take more memory
        ctx.scale = scale
        k, v = k.contiguous(), v.contiguous()  # read once a block
        B, H, T, _ = q.shape
        y = q.new_empty(B, T, H, v.shape[-1])  # as the output projection reads it
        for rows, probabilities, _ in blocks(q, k, scale):
            values = v[:, :, : rows.stop].flatten(0, 1)
            y[:, rows] = torch.bmm(probabilities, values).view(B, H, -1, v.shape[-1]).transpose(1, 2)
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        k, v = k.contiguous(), v.contiguous()
        grad_q, (grad_k, grad_v) = torch.empty_like(q), (torch.zeros_like(each, dtype=torch.float32) for each in (k, v))
        for rows, probabilities, queries in blocks(q, k, ctx.scale):
            keys, values = (each[:, :, : rows.stop].flatten(0, 1) for each in (k, v))
            grads = grouped(grad, k, rows)
            grad_v[:, :, : rows.stop] += torch.bmm(probabilities.mT, grads).view_as(v[:, :, : rows.stop])
            grad_p = torch.bmm(grads, values.mT)
            grad_s = torch._softmax_backward_data(grad_p, probabilities, -1, q.dtype)
            grad_q[:, :, rows] = torch.bmm(grad_s, keys).mul_(ctx.scale).view_as(q[:, :, rows])
            grad_k[:, :, : rows.stop] += torch.bmm(grad_s.mT, queries).view_as(k[:, :, : rows.stop])
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def grouped(x: Tensor, k: Tensor, rows: slice) -> Tensor:
    """Some rows of x (B, H, T, D), grouped by the keys and values that heads share: (B K, G rows, D)."""
    return x[:, :, rows].reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def blocks(q: Tensor, k: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each block of rows, its probabilities (B K, G rows, positions up to its end), and its scaled queries."""
    T = q.shape[2]
    ahead = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype).triu(1)
    for begin in range(0, T, BLOCK):
        rows = slice(begin, min(begin + BLOCK, T))
        size = rows.stop - begin
        queries = grouped(q, k, rows) * scale
        scores = torch.bmm(queries, k[:, :, : rows.stop].flatten(0, 1).mT)
        scores.view(len(scores), -1, size, rows.stop)[..., begin:].add_(ahead[:size, :size])
        yield rows, torch.softmax(scores, -1), queries
