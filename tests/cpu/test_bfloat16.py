"""bfloat16 on a CPU: where `dtype=auto` takes it, attention by matmuls, and casts that a step's micro-batches share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import GPT2, random_tokens
from test_train import in_corpus, tensors, train
from torch import Tensor
from torch.nn import functional as F

from model import GPT, GPTConfig
from nib.common.device import Precision
from nib.cpu.bfloat16 import BLOCK, LEAST_WIDTH, attention, gelu, linear, replace_autocast_operations
from nib.training.distributed import Cluster
from nib.training.placement import training_precision
from nib.training.settings import TrainSettings

__all__ = ["in_corpus"]  # the fixture that gives a test a directory with data/

CPU = Cluster(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("length", [1, 5, BLOCK, 2 * BLOCK + 77])
@pytest.mark.parametrize("heads", [(3, 3), (4, 2)], ids=str)
def test_causal_attention_and_its_gradients_are_those_of_float64(length: int, heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, length, sum(heads) + heads[1], 16).bfloat16()  # as one matmul of the model leaves them
    direction = torch.randn(2, heads[0], length, 16)

    def results(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        given = qkv.to(dtype, copy=True).requires_grad_()
        q, k, v = given.transpose(1, 2).split_with_sizes([heads[0], heads[1], heads[1]], dim=1)
        function: Any = attention if ours else F.scaled_dot_product_attention
        with torch.autocast("cpu", enabled=ours):
            y = function(q, k, v, None, 0.0, True, enable_gqa=heads[1] < heads[0])
        (y * direction.to(y.dtype)).sum().backward()
        assert given.grad is not None
        return [y.detach().double(), given.grad.double()]

    exact, torchs = results(torch.float64, False), results(torch.bfloat16, False)
    for found, theirs, expected in zip(results(torch.bfloat16, True), torchs, exact, strict=True):
        # Scores are rounded to 8 bits here. Or no further from the truth than twice as far as torch's own kernel.
        bound = max(2 * float((theirs - expected).abs().max()), 2**-7 * float(expected.abs().max()))
        assert (found - expected).abs().max() <= bound


def test_what_is_not_plain_causal_attention_is_left_to_torch() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    mask = torch.rand(6, 6) < 0.7
    mask.fill_diagonal_(True)
    for arguments in ((mask,), (None, 0.0, False), (None, 0.0, True)):
        torch.testing.assert_close(
            attention(q, k, v, *arguments).float(),
            F.scaled_dot_product_attention(q, k, v, *arguments),
            rtol=0,
            atol=0.03,
        )
    double = [each.double() for each in (q, k, v)]
    assert attention(*double, None, 0.0, True).dtype == torch.float64


def test_a_model_in_bfloat16_takes_that_attention_and_float32_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_autocast_operations()
    model = GPT(GPTConfig(vocab_size=40, n_layer=2, n_head=2, n_embd=16, block_size=24))
    seen: list[Any] = []
    real = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *each: (seen.append(each), real(*each))[1])
    model(random_tokens(2, 24))
    assert not seen
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_tokens(2, 24))
    assert seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 7, 5)], ids=str)
@pytest.mark.parametrize("approximate", [None, "none", "tanh"])
def test_linear_layers_and_their_gradients_are_those_of_torchs_autocast(
    approximate: str | None, shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    given, direction = torch.randn(shape), torch.randn(*shape[:-1], 3)
    weights = [torch.randn(3, 5), torch.randn(3)][: 1 + bias]

    def results(ours: bool) -> list[Tensor]:
        leaves = [each.clone().requires_grad_() for each in (given, *weights)]
        x = leaves[0].bfloat16()
        with torch.autocast("cpu"):
            if approximate:
                x = (gelu if ours else F.gelu)(x, approximate=approximate)
            y = (linear if ours else F.linear)(x, *leaves[1:])
        (y * direction).sum().backward()
        return [y.detach(), *(each.grad for each in leaves if each.grad is not None)]

    found, expected = results(True), results(False)
    assert len(found) == len(expected) == 3 + bias
    for ours, torchs in zip(found, expected, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("of_input", [False, True])
def test_a_result_of_gelu_that_was_changed_in_place_is_kept_as_it_is(of_input: bool) -> None:
    x, weight = torch.randn(4, 5).bfloat16(), torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu"):
        y = gelu(x)
        (x if of_input else y).mul_(2)
        linear(y, weight).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, y.float().sum(0).expand(3, 5), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_second_derivatives_are_refused_not_wrong(name: str) -> None:
    x = torch.randn(1, 2, 4, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, torch.randn(8, 8)) if name == "linear" else attention(x, x, x, causal=True)
    (grad,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_copy_of_a_weight_and_no_result_of_gelu_stays_until_the_backward_pass() -> None:
    replace_autocast_operations()
    model = GPT(GPTConfig(vocab_size=64, n_layer=4, n_head=2, n_embd=64, block_size=16, mlp="gelu"))
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda each: (kept.append(each), each)[1], lambda each: each)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        model.hidden(random_tokens(1, 16, vocab_size=64))
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    assert not [each for each in kept if each.dtype == torch.bfloat16 and tuple(each.shape) in shapes]
    wide = {each.data_ptr() for each in kept if each.shape[-1] == model.config.mlp_hidden and each.ndim == 3}
    assert len(wide) == model.config.n_layer


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("width", [LEAST_WIDTH - 1, LEAST_WIDTH])
def test_auto_is_bfloat16_for_wide_models_on_a_cpu_that_has_it(
    native: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nib.training.placement.has_bfloat16", lambda: native)
    for name, checkpoint, expected in (
        ("auto", None, native and width == LEAST_WIDTH),
        ("auto", {}, False),  # older checkpoints do not say, and were made in float32
        ("auto", {"cpu_dtype": "bfloat16"}, True),
        ("auto", {"cpu_dtype": "float32"}, False),
        ("float32", None, False),
        ("bfloat16", None, True),
    ):
        state: Any = type("", (), {"state": checkpoint})() if checkpoint is not None else None
        found = training_precision(TrainSettings(dtype=name), width, CPU, state).dtype
        assert found == (torch.bfloat16 if expected else torch.float32), (name, checkpoint)


def test_a_run_goes_on_in_its_dtype_on_another_cpu(
    in_corpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same weights as without the break, and a warning where that CPU is slow in bfloat16."""
    monkeypatch.setattr("nib.training.placement.LEAST_WIDTH", 16)

    def run(name: str, steps: int, native: bool) -> str:
        for module in ("placement", "run"):
            monkeypatch.setattr(f"nib.training.{module}.has_bfloat16", lambda: native)
        assert train(f"--out_dir=out/{name}", f"--max_iters={steps}", "--schedule=constant") == 0
        return "".join(capsys.readouterr())

    assert "bfloat16" in run("whole", 4, True)
    assert "slow on this CPU" not in run("broken", 2, True)
    assert "slow on this CPU" in run("broken", 4, False)
    whole, broken = tensors("out/whole"), tensors("out/broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert "float32" in run("narrow", 2, False)
    assert "bfloat16" not in run("narrow", 4, True)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_micro_batches_share_casts_and_no_step_sees_those_of_another(micro_batches: int) -> None:
    torch.manual_seed(0)
    model, precision = GPT(GPTConfig(vocab_size=40, block_size=8, **GPT2)), Precision("bfloat16", torch.device("cpu"))
    for _ in range(2):
        gradients = []
        for shared in (True, False):
            parts = [random_tokens(2, 9, seed=seed) for seed in range(micro_batches)]
            for part in precision.casting_once(parts) if shared else parts:
                with precision.autocast():
                    _, loss = model(part[:, :-1], part[:, 1:])
                loss.backward()
            gradients.append([each.grad.clone() for each in model.parameters()])
            model.zero_grad()
        assert all(map(torch.equal, *gradients))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
