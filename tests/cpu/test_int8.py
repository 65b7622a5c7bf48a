"""Weights for sampling: packed ones compute the same, 8-bit ones nearly, and both whatever else is in the batch."""

from __future__ import annotations

import math

import pytest
import torch
from model_helpers import LLAMA, random_model, random_tokens

from nib.cpu.build import kernels
from nib.cpu.int8 import Int8Linear, pack_int8, quantize, quantize_rows
from nib.cpu.linear import RowsLinear, pack_bfloat16, pack_linears

SHAPES = [{}, LLAMA, dict(qk_norm=True, n_kv_head=2, bias=False)]


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_packed_weights_give_the_same_logits(shape):
    model, packed, tokens = random_model(**shape), random_model(**shape), random_tokens(3, 9)
    if not pack_linears(packed):
        pytest.skip("there are no kernels")
    assert any(isinstance(module, RowsLinear) for module in packed.modules())
    expected = model(tokens)[0]
    cache = packed.make_cache(3)
    steps = torch.cat([packed(tokens[:, i : i + 1], cache=cache)[0] for i in range(9)], dim=1)
    # Sums of some ten products in another order: a few units in the last place of the largest logit.
    for logits in (packed(tokens)[0], steps):
        assert (logits - expected).abs().max() < 3e-6 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_16_bit_weights_compute_what_float32_does_with_the_rounded_numbers(shape):
    packed, plain, tokens = random_model(**shape), random_model(**shape), random_tokens(3, 200)
    if not (native := kernels()):
        pytest.skip("there are no kernels")
    pack_bfloat16(packed, native)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear) or module is plain.wte:
            module.weight.copy_(module.weight.bfloat16())
    for part in (tokens[:, :9], tokens[:1, :1]):
        expected, found = plain(part)[0], packed(part)[0]
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 3e-6 * expected.abs().max()
    layer, x = packed.blocks[0].mlp.up, torch.randn(1000, packed.config.n_embd)  # by oneDNN, few by kernels.c
    assert torch.allclose(layer(x)[:5], layer(x[:5]), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer(x[:5])[3], layer(x[3:4])[0])


def test_a_row_of_integers_is_within_half_a_step_of_the_weights():
    weight = torch.randn(6, 50) * torch.logspace(-3, 3, 6)[:, None]
    weight[2] = 0
    integers, scale = quantize_rows(weight)
    assert integers.dtype == torch.int8 and integers.abs().max() == 127
    assert ((integers * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all()
    assert (integers[2] == 0).all()


@torch.inference_mode()
def test_an_8_bit_row_does_not_depend_on_its_batch():
    model, tokens = random_model(**LLAMA), random_tokens(8, 6)
    quantize(model)
    pack_int8(model)
    layer, x = model.blocks[0].mlp.up, model.wte(tokens)
    assert torch.equal(layer(x)[3, 2], layer(x[3, 2]))  # to the bit


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_the_kernel_and_the_plain_product_agree(shape):
    packed, plain, tokens = random_model(**shape), random_model(**shape), random_tokens(3, 9)
    quantize(packed)
    quantize(plain)
    pack_int8(packed)
    plain.head = plain.head or Int8Linear(plain.wte.weight, plain.wte.weight_scale, None)  # what pack_int8 adds
    a, b = packed(tokens)[0], plain(tokens)[0]
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 2000.0, 2e4])
@torch.inference_mode()
def test_8_bit_weights_leave_activations_the_range_of_their_dtype(size, dtype, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 40, bias=bias)
    layer.weight[:8] *= 1e-4  # scales that float16 would round to a few bits
    x = (size * torch.rand(5, 64)).to(dtype)
    quantized = Int8Linear(*quantize_rows(layer.weight), layer.bias)
    weight = (quantized.weight * quantized.weight_scale[:, None]).double()
    exact = x.double() @ weight.T + (layer.bias.double() if bias else 0)
    assert exact.abs().max() < torch.finfo(torch.float16).max
    # Each weight and the result are rounded once. float16 has no numbers closer to each other than 6e-8.
    rounding = x.double().abs() @ (weight.abs() + (1e-4 if dtype == torch.float16 else 0)).T + exact.abs()
    assert ((quantized(x).double() - exact).abs() <= torch.finfo(dtype).eps * rounding).all()


@torch.inference_mode()
def test_8_bits_hardly_change_a_prediction():
    model, tokens = random_model(n_embd=64), random_tokens(4, 20)
    expected = model(tokens)[0].log_softmax(-1)
    quantize(model)
    pack_int8(model)
    found = model(tokens)[0].log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 0 < divergence < 0.02  # nats; these weights are larger than any trained model's


def test_a_diverged_model_stays_visible_in_8_bits():
    layer = Int8Linear(*quantize_rows(torch.randn(4, 8)), None)
    layer.pack()
    assert not layer(torch.full((1, 8), math.nan)).isfinite().any()
