"""Faster float32 matmul on CPUs with AVX-512: oneDNN, which torch contains, instead of MKL.

MKL uses its AVX-512 kernels only on Intel processors. On an AMD EPYC (Zen 5), one thread, torch 2.13, MKL reached 92 to
109 GFLOP/s at the shapes of GPTs of width 128 to 768, and oneDNN 150 to 245.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# Below so many multiplications the overhead of Python is larger than the gain.
LEAST_WORK = 2**20
MOST_COPIED = 2**19  # elements of a result; copying a larger one takes as long as it saves
_library: torch.library.Library | None = None  # the kernels stay registered as long as this exists


def use_onednn() -> bool:
    """Use oneDNN for every float32 `mm` and `addmm` of this process, also in backward passes. Returns whether it does.

    The choice depends only on the kind of processor, so that a resumed run rounds as before.
    """
    global _library
    wanted = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if _library is None and wanted:
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced
            _library.impl("mm", mm, "CPU")
            _library.impl("addmm", addmm, "CPU")
    return _library is not None


def suits(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype == torch.float32 and a.shape[1] == b.shape[0]
    # On a slice of columns, such as the gradient of a part of a layer's outputs, oneDNN takes 500 times as long.
    return alike and a.numel() * b.shape[1] >= LEAST_WORK and is_dense(a) and is_dense(b)


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.t().is_contiguous()


def is_tall(a: Tensor, b: Tensor) -> bool:
    """Whether (b^T a^T)^T is faster: oneDNN's operator copies a column-major factor. When the gradient of a weight is
    computed, that factor is the gradient of the output; transposed, it is the layer's input, which is smaller.
    """
    rows, columns = a.shape[0], b.shape[1]
    return not a.is_contiguous() and rows >= 2 * columns and rows * columns < MOST_COPIED


def mm(a: Tensor, b: Tensor) -> Tensor:
    """(rows, inner) times (inner, columns)."""
    if suits(a, b):
        if is_tall(a, b):
            return torch.ops.mkldnn._linear_pointwise(b.t(), a, None, "none", [], "").t().contiguous()
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))  # the overload with `out` is not replaced


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """bias + a b, where bias is (columns,) as in a linear layer; anything else is left to torch."""
    if bias.ndim == 1 and bias.dtype == torch.float32 and beta == alpha == 1 and suits(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))
