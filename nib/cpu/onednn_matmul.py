"""Faster float32 matrix products on CPUs with AVX-512: by oneDNN, which torch contains, instead of by MKL.

MKL takes its AVX-512 kernels on Intel's processors only. On an AMD EPYC (Zen 5), one thread, torch 2.13, it was
measured to do 92 to 109 GFLOP/s at the shapes of GPTs from width 128 to 768, and oneDNN 150 to 245.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# Below so many multiplications the way through Python costs more than the faster product saves.
LEAST_WORK = 2**20
MOST_COPIED = 2**19  # elements of a result, beyond which to copy it takes as long as what it saves
_library: torch.library.Library | None = None  # the kernels live as long as it does


def use_onednn() -> bool:
    """Let every float32 `mm` and `addmm` of this process, in backward passes too, go to oneDNN; whether it does now.

    The choice depends on the processor's kind alone, so that a run that is resumed rounds as it did before.
    """
    global _library
    wanted = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
    if _library is None and wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is replaced
            _library.impl("mm", mm, "CPU")
            _library.impl("addmm", addmm, "CPU")
    return _library is not None


def suits(a: Tensor, b: Tensor) -> bool:
    alike = a.dtype == b.dtype == torch.float32 and a.shape[1] == b.shape[0]
    # With a slice of columns, as the gradient of a part of a layer's outputs is, oneDNN takes 500 times as long.
    return alike and a.numel() * b.shape[1] >= LEAST_WORK and is_dense(a) and is_dense(b)


def is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.t().is_contiguous()


def is_tall(a: Tensor, b: Tensor) -> bool:
    """Whether (b^T a^T)^T is faster: oneDNN's operator copies a factor that lies in columns, as the gradient of a
    layer's output does when that of its weight is made, and the layer's input, now the one to copy, is smaller.
    """
    rows, columns = a.shape[0], b.shape[1]
    return not a.is_contiguous() and rows >= 2 * columns and rows * columns < MOST_COPIED


def mm(a: Tensor, b: Tensor) -> Tensor:
    """(rows, inner) times (inner, columns)."""
    if suits(a, b):
        if is_tall(a, b):
            return torch.ops.mkldnn._linear_pointwise(b.t(), a, None, "none", [], "").t().contiguous()
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))  # this overload is torch's own


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """bias + a b, where bias is (columns,) as in a linear layer; anything else is left to torch."""
    if bias.ndim == 1 and bias.dtype == torch.float32 and beta == alpha == 1 and suits(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.addmm(bias, a, b, beta=beta, alpha=alpha, out=a.new_empty(a.shape[0], b.shape[1]))
