"""The loss: in chunks as at once, forward and backward, and with targets that do not count."""

from __future__ import annotations

import pytest
import torch
from model_helpers import GPT2, random_model, random_tokens
from torch import Tensor
from torch.nn import functional as F

from model import GPT, ChunkedCrossEntropy, GPTConfig


def masked_targets(seed: int = 1) -> Tensor:
    targets = random_tokens(3, 20, seed=seed)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(seed)) < 0.25] = -1
    return targets


def loss_and_gradients(
    model: GPT, targets: Tensor, *, rows: int, dtype: torch.dtype | None = None, multiple: int = 1
) -> dict[str, Tensor]:
    """Loss and gradients, in chunks of `rows` rows of logits; "stream" is the gradient of what the head reads."""
    model.max_logits, model.vocab_multiple = rows * model.config.vocab_size, multiple
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        x = model.hidden(random_tokens(3, 20))
        x.retain_grad()
        loss = model.loss(x, targets)
    assert loss.dtype == torch.float32
    (loss * 3).backward()
    assert x.grad is not None
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "stream": x.grad, **found}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows", "multiple"), [(1, 1), (7, 1), (59, 1), (7, 64), (60, 64), (60, 7)])
def test_chunked_loss_is_the_plain_loss(tied: bool, rows: int, multiple: int) -> None:
    model, targets = random_model(tie_weights=tied), masked_targets()
    plain = loss_and_gradients(model, targets, rows=60)
    by_hand = F.cross_entropy(model(random_tokens(3, 20))[0].flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(plain["loss"], by_hand)
    chunked = loss_and_gradients(model, targets, rows=rows, multiple=multiple)
    assert chunked.keys() == plain.keys()
    for name, expected in plain.items():
        # The same terms in another order: float32 rounding of the largest of them.
        bound = 2e-6 * float(expected.abs().max())
        torch.testing.assert_close(chunked[name], expected, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("rows", [7, 60])
def test_loss_with_no_target_is_zero(rows: int) -> None:
    found = loss_and_gradients(random_model(), torch.full((3, 20), -1), rows=rows)
    assert all(not value.any() for value in found.values()), "and so are all gradients"


@pytest.mark.parametrize("rows", [7, 60])
def test_masked_targets_count_nothing(rows: int) -> None:
    model, targets = random_model(), masked_targets()
    model.max_logits = rows * 40
    kept = targets.flatten() >= 0
    x = model.hidden(random_tokens(3, 20)).flatten(0, 1)[kept]
    expected = F.cross_entropy(model.logits(x), targets.flatten()[kept])
    torch.testing.assert_close(model(random_tokens(3, 20), targets)[1], expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("rows", "multiple"), [(1, 1), (7, 1), (60, 64)])
def test_chunked_loss_is_the_plain_loss_under_autocast(rows: int, multiple: int) -> None:
    model, targets = random_model(), masked_targets()
    plain = loss_and_gradients(model, targets, rows=60, dtype=torch.bfloat16)
    chunked = loss_and_gradients(model, targets, rows=rows, dtype=torch.bfloat16, multiple=multiple)
    # Both round the logits to bfloat16 at the same place, and sum in float32.
    torch.testing.assert_close(chunked["loss"], plain["loss"], rtol=2e-6, atol=0)
    for name in plain.keys() - {"loss"}:
        # The gradient of each logit is rounded to bfloat16, 2^-9 of it, before or after the mean is taken; the
        # rounding errors of the layers behind are as large, and not the same.
        error = (chunked[name] - plain[name]).norm() / plain[name].norm().clamp_min(1e-9)
        assert error < 2**-6, (name, float(error))


def test_chunked_loss_keeps_no_logits() -> None:
    """What is alive between forward and backward is the size of x and W, not of the logits."""
    model = GPT(GPTConfig(**GPT2, vocab_size=5000, block_size=64, n_layer=1, n_head=2, n_embd=16))
    model.max_logits = 4 * 5000
    tokens = random_tokens(4, 64, vocab_size=5000)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        model(tokens, tokens)
    assert max(saved) <= 5000 * 16 < 4 * 64 * 5000


def test_chunked_loss_without_gradients() -> None:
    model = random_model()
    model.max_logits = 7 * 40
    with torch.no_grad():
        _, quiet = model(random_tokens(3, 20), masked_targets())
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, model(random_tokens(3, 20), masked_targets())[1].detach())


def test_16_bit_weights_get_a_gradient_that_was_summed_in_float32() -> None:
    """As FSDP has them; many chunks must not round their sum to 16 bits as often as there are chunks."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(512, 16), torch.randn(40, 16), torch.randint(40, (512,))
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        leaf = weight.bfloat16().to(dtype).requires_grad_()
        ChunkedCrossEntropy.apply(x.bfloat16().to(dtype), leaf, targets, 40, 4, True).backward()
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        found.append(leaf.grad.double())
    # A chunk's own product rounds to 2^-9 of itself, and chunks cancel in part.
    assert (found[1] - found[0]).norm() / found[0].norm() < 0.004


def test_without_a_limit_chunks_grow_with_the_root_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    model.max_logits, model.vocab_multiple, rows = 0, 64, []
    monkeypatch.setattr(ChunkedCrossEntropy, "apply", lambda *given: rows.append(given[4]) or given[0].sum())
    for tokens in (8, 72, 2048):
        model.loss(torch.zeros(1, tokens, 32), torch.zeros(1, tokens, dtype=torch.int64))
    assert rows == [16, 48, 256], "above 128 whole tiles"
