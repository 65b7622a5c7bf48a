"""Matrix products by oneDNN are those of float64 to rounding, and what does not suit them goes torch's own way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nib.cpu import onednn_matmul as products

if not products.use_onednn():
    pytest.skip("this processor has no AVX-512, so products stay torch's own", allow_module_level=True)


SHAPES = [(3, 4, 5), (1, 7, 1), (200, 300, 100), (301, 129, 65), (400, 70, 150), (1, 4096, 1024)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_linear_layer_and_its_gradients_are_those_of_float64(shape: tuple[int, int, int], bias: bool) -> None:
    rows, inner, columns = shape
    torch.manual_seed(0)
    sizes = [(rows, inner), (columns, inner), (columns,)][: 3 if bias else 2]
    exact = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    direction = torch.randn(rows, columns, dtype=torch.float64)
    for tensors in (exact, ours):
        y = F.linear(*tensors)
        (y * direction.to(y.dtype)).sum().backward()
    # Sums of up to 4096 products of size 1, in float32: some 1e-5.
    torch.testing.assert_close(F.linear(*ours).double(), F.linear(*exact), rtol=1e-5, atol=1e-4)
    for one, other in zip(ours, exact, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "a row for all"])
def test_any_layout_of_memory_will_do(layout: str) -> None:
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    given = {"plain": a, "transposed": a.t(), "strided": torch.randn(512, 512)[::2, ::2], "a row for all": a[:1]}[
        layout
    ]
    given = given.expand(256, 256)
    torch.testing.assert_close((given @ b).double(), given.double() @ b.double(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((b @ given).double(), b.double() @ given.double(), rtol=1e-5, atol=1e-4)


def test_a_slice_of_columns_which_onednn_is_slow_with_is_torchs_own() -> None:
    whole = torch.randn(512, 1024)
    assert products.suits(whole, whole.t()) and not products.suits(whole[:, :512], whole)


def test_other_kinds_of_products_are_torchs_own() -> None:
    a, b = torch.randn(200, 200), torch.randn(200, 200)
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.5)):
        product = a.to(dtype) @ b.to(dtype)
        assert product.dtype == dtype
        torch.testing.assert_close(product.float(), a @ b, rtol=0.05, atol=tolerance)
    torch.testing.assert_close(torch.addmm(a, a, b, beta=2, alpha=3), 2 * a + 3 * (a @ b), rtol=1e-5, atol=1e-3)
    assert (torch.randn(0, 200) @ b).shape == (0, 200)
    assert not (torch.randn(200, 0) @ torch.randn(0, 200)).any()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.randn(300, 300) @ torch.randn(200, 300)


def test_the_same_product_twice_is_the_same_to_the_last_bit() -> None:
    a, b = torch.randn(500, 300), torch.randn(300, 400)
    assert torch.equal(a @ b, a @ b)
