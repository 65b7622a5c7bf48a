"""All blocks in one call: the model's own numbers for every kind of it, and none where it computes something else."""

from __future__ import annotations

import ctypes
import platform
import shutil

import pytest
import torch
from model_helpers import LLAMA, random_model, random_tokens, randomise
from torch import Tensor
from torch.nn import functional as F

import model as model_module
from model import GPT, MLP, Attention, KVCache
from nib.cpu import build as native
from nib.cpu import fused_blocks
from nib.cpu.build import Kernels, compiled
from nib.cpu.fused_blocks import FusedBlocks, fuse_blocks
from nib.cpu.int8 import pack_int8, quantize
from nib.cpu.linear import pack_bfloat16, pack_linears
from nib.generation.engine import generate_text, take_rows
from nib.generation.request import SamplingSettings
from nib.tokenizer.tokenizer import ByteTokenizer

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
INTEL = platform.machine() == "x86_64"
PLAIN = ["-O3", "-fPIC"]  # what any processor of the kind has

SHAPES = {
    "gpt2": dict(),
    "llama": {**LLAMA, "n_kv_head": 2},
    "yarn": {**LLAMA, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original": 8},
    "swiglu of an odd width": dict(mlp="swiglu", mlp_hidden=37, bias=False),
    "gelu, window": dict(mlp="gelu", window=5, position="sinusoidal"),
    "relu2, one key head": dict(mlp="relu2", n_kv_head=1, position="rope", window=3, qk_norm=True),
    "relu, heads of 12": dict(mlp="relu", head_size=12, position="rope", qk_norm=True, norm="rmsnorm"),
    "rmsnorm with bias, wide heads": dict(norm="rmsnorm", head_size=40, position="none"),
    "one number more than vectors": dict(
        n_embd=33, n_head=3, head_size=17, mlp_hidden=65, position="none", qk_norm=True
    ),
    "longer than a vector": dict(n_embd=300, n_head=3, mlp_hidden=700, norm_eps=1e-3),
}


def packed(joined: bool, bits: int = 32, **changes) -> GPT:
    model = random_model(**changes)
    if bits == 32:
        pack_linears(model)
    elif bits == 16:
        pack_bfloat16(model, fused_blocks.kernels())
    else:
        quantize(model)
        pack_int8(model)
    assert not joined or not fuse_blocks(model)
    return model


def steps(model: GPT, cache: KVCache) -> list[Tensor]:
    """Rows of different lengths, one token each, several tokens each, rows that are taken, and no more room."""
    found = [model(random_tokens(3, 7), cache=cache)[0]]
    cache.lengths = [7, 1, 4]
    for seed, width in ((1, 1), (2, 1), (3, 3), (4, 1)):
        found.append(model(random_tokens(3, width, seed=seed), cache=cache)[0])
    cache = take_rows(cache, [2, 0])
    found.append(model(random_tokens(2, 2, seed=5), cache=cache)[0])
    alone = take_rows(cache, [1])
    while alone.lengths[0] < alone.max_length:
        found.append(model(random_tokens(1, 1, seed=alone.lengths[0]), cache=alone)[0])
    with pytest.raises(ValueError, match="the context is full"):
        model(random_tokens(1, 1), cache=alone)
    return found


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_logits_and_cache_are_those_of_the_blocks(name, bits):
    model, plain = (packed(joined, bits, **SHAPES[name]) for joined in (True, False))
    assert isinstance(model.blocks[0], FusedBlocks)
    ours, theirs = model.make_cache(3), model.make_cache(3)
    for found, expected in zip(steps(model, ours), steps(plain, theirs), strict=True):
        # Float32 rounding of sums in another order, through two layers. torch 2.6 gave 1.2e-5.
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert ours.lengths == theirs.lengths
    assert (ours.memory - theirs.memory).abs().max() < 1e-5 * theirs.memory.abs().max()


@pytest.mark.parametrize("flags", [PLAIN] + [[*PLAIN, "-mavx2", "-mfma"]] * INTEL)
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_other_processors_compute_the_same(tmp_path_factory, monkeypatch, flags, name):
    monkeypatch.setattr(native, "FLAGS", flags)
    directory = tmp_path_factory.getbasetemp() / f"flags-{len(flags)}"
    directory.mkdir(exist_ok=True)
    made = Kernels(ctypes.CDLL(str(compiled(directory))))
    for module in ("cpu.linear", "cpu.int8", "cpu.fused_blocks"):
        monkeypatch.setattr(f"nib.{module}.kernels", lambda: made)
    for bits in (32, 16, 8):
        packed(True, bits, **SHAPES[name])


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_whatever_its_batch_its_width_and_the_threads(name, bits):
    model, tokens = packed(True, bits, **SHAPES[name]), random_tokens(4, 9)

    def logits(rows: list[int], widths: list[int], threads: int = 1) -> Tensor:
        torch.set_num_threads(threads)
        try:
            cache, begin, found = model.make_cache(len(rows)), 0, []
            for width in widths:
                found.append(model.hidden(tokens[rows, begin : begin + width], cache))
                begin += width
        finally:
            torch.set_num_threads(1)
        return torch.cat(found, dim=1)

    together = logits([0, 1, 2, 3], [3, 1, 1, 3, 1])
    assert torch.equal(logits([0, 1, 2, 3], [3, 1, 1, 3, 1], threads=3), together)
    for rows, widths in (([1], [1] * 9), ([3], [9]), ([2, 1], [2, 5, 1, 1]), ([1, 0, 2], [4, 4, 1])):
        assert torch.equal(logits(rows, widths), together[rows]), (rows, widths)


def test_among_a_whole_context_of_keys_large_queries_do_not_turn_rounding_into_a_change(monkeypatch):
    """Those of SmolLM2 did. Here the difference is 4e-5 among keys of size 1, and 2.5e-6 among those of the check."""
    shape = dict(block_size=4096, n_layer=8, n_embd=64, n_head=1, head_size=64)
    model = random_model(**LLAMA | shape)
    randomise(model, 1)
    with torch.no_grad():
        for block in model.blocks:
            for part, size in zip(block.attention.qkv.weight.split(64), (10, 0.1, 0.1), strict=True):
                part *= size
            block.attention.out.weight *= 0.3
            block.mlp.down.weight *= 0.3
    pack_linears(model)
    monkeypatch.setattr(fused_blocks, "TOLERANCE", 1e-5)
    assert not fuse_blocks(model)


def test_the_same_text_as_without(monkeypatch):
    prompts = ["", "a", "how the text goes on", "x" * 40]
    settings = SamplingSettings(max_new_tokens=30, num_samples=2, seed=3)
    written = [
        [
            sample.tokens
            for sample in generate_text(
                packed(joined, vocab_size=ByteTokenizer().vocab_size, position="rope"),
                ByteTokenizer(),
                prompts,
                settings,
            )
        ]
        for joined in (True, False)
    ]
    assert written[0] == written[1]


def changed_attention(self: Attention, x: Tensor, *inputs) -> Tensor:
    return attention_as_it_is(self, x, *inputs) * (1 + 0.001 * self.layer)


def changed_mlp(self: MLP, x: Tensor) -> Tensor:
    return self.down(F.silu(self.up(x)))


def changed_update(self: KVCache, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return update_as_it_is(self, layer, positions, k, v * 1.001)


def changed_memory(self: KVCache, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = (held.clone() for held in update_as_it_is(self, layer, positions, k, v))
    self.memory[1, layer, ..., -1, :] *= 1.01
    return keys, values


def changed_far_on(self: Attention, x: Tensor, *inputs) -> Tensor:
    """As a window that only some layers have, or a scale for long contexts."""
    return attention_as_it_is(self, x, *inputs) * (1.01 if inputs[0].max() > 80 else 1)


def changed_for_one_token(self: Attention, x: Tensor, *inputs) -> Tensor:
    return attention_as_it_is(self, x, *inputs) * (1.01 if x.shape[1] == 1 else 1)


def refuse(self: KVCache, new: int) -> None:
    raise AssertionError("this is no cache for that")


attention_as_it_is, update_as_it_is = Attention.forward, KVCache.update
inputs_as_they_are = GPT.attention_inputs


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (Attention, ("forward", changed_attention)),
        (Attention, ("forward", changed_far_on)),
        (Attention, ("forward", changed_for_one_token)),
        (MLP, ("forward", changed_mlp)),
        (KVCache, ("update", changed_update)),
        (KVCache, ("update", changed_memory)),
    ],
)
@torch.inference_mode()
def test_a_changed_model_goes_its_own_way(monkeypatch, kind, change):
    monkeypatch.setattr(kind, *change)
    model = random_model(block_size=100)
    pack_linears(model)
    expected = model(random_tokens(1, 1), cache=model.make_cache(1))[0]
    assert fuse_blocks(model) and len(model.blocks) == 2
    assert torch.equal(model(random_tokens(1, 1), cache=model.make_cache(1))[0], expected)


def test_whatever_the_check_raises_the_model_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(KVCache, "advance", refuse)
    model = random_model().train()
    pack_linears(model)
    assert fuse_blocks(model)
    assert len(model.blocks) == 2 and all(module.training for module in model.modules())


def own_document(self: GPT, tokens: Tensor, cache: KVCache):
    """Nothing before a token 7 is seen again."""
    positions, mask, rotation, cache = inputs_as_they_are(self, tokens, cache)
    if (tokens == 7).any():
        mask = (torch.arange(cache.end) >= cache.end - 1)[None]
    return positions, mask, rotation, cache


def biased(self: GPT, tokens: Tensor, cache: KVCache):
    positions, mask, rotation, cache = inputs_as_they_are(self, tokens, cache)
    if (tokens == 7).any():
        mask = (torch.arange(cache.end) * 0.5).masked_fill(torch.arange(cache.end) == 0, -torch.inf)[None]
    return positions, mask, rotation, cache


def moved(self: GPT, tokens: Tensor, cache: KVCache):
    """A cache that begins again when it is full, say."""
    positions, mask, rotation, cache = inputs_as_they_are(self, tokens, cache)
    if (tokens == 7).any():
        positions = positions + 2**40
    return positions, mask, rotation, cache


def in_32_bits(self: GPT, tokens: Tensor, cache: KVCache):
    positions, mask, rotation, cache = inputs_as_they_are(self, tokens, cache)
    positions = positions.int()
    return positions, mask, rotation, cache


@pytest.mark.parametrize("change", [own_document, biased, moved, in_32_bits])
@torch.inference_mode()
def test_other_positions_and_masks_go_to_the_blocks(monkeypatch, change):
    monkeypatch.setattr(GPT, "attention_inputs", change)
    model, plain = (packed(joined, position="none") for joined in (True, False))
    caches = [model.make_cache(1) for _ in range(2)]
    for tokens in ([[1, 2, 3]], [[7]]):
        ours, theirs = (
            network(torch.tensor(tokens), cache=cache)[0] for network, cache in zip((model, plain), caches, strict=True)
        )
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (caches[0].memory - caches[1].memory).abs().max() < 1e-5 * caches[1].memory.abs().max()


ROTATIONS = {
    "half as wide": lambda turn: turn[..., :4],
    "float64": lambda turn: turn.double(),
    "in columns": lambda turn: turn.mT.contiguous().mT,
}


@pytest.mark.parametrize("change", ROTATIONS)
@torch.inference_mode()
def test_rotations_of_another_kind_are_not_misread(monkeypatch, change):
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned = rotate_as_it_is(x[..., : cos.shape[-1]], cos.float(), sin.float())
        return torch.cat((turned, x[..., cos.shape[-1] :]), dim=-1)

    def changed(self: GPT, tokens: Tensor, cache: KVCache):
        positions, mask, rotation, cache = inputs_as_they_are(self, tokens, cache)
        return positions, mask, [ROTATIONS[change](turn) for turn in rotation], cache

    rotate_as_it_is = model_module.rotate
    monkeypatch.setattr(model_module, "rotate", rotated)
    monkeypatch.setattr(GPT, "attention_inputs", changed)
    model, plain = (packed(joined, position="rope") for joined in (True, False))
    ours, theirs = (each(random_tokens(1, 3), cache=each.make_cache(1))[0] for each in (model, plain))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh", "relu", "relu2", "swiglu"])
@torch.inference_mode()
def test_what_is_no_number_stays_none(mlp):
    model = packed(True, mlp=mlp)
    model.blocks[0].blocks[0].mlp.up.weight[:] = torch.nan
    assert model(random_tokens(1, 1), cache=model.make_cache(1))[0].isnan().all()


class Repeated(GPT):
    """The input of the first block is added to the input of each."""

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        inputs = self.attention_inputs(tokens, cache)
        x = first = self.wte(tokens)
        for block in self.blocks:
            x = block(x + first, *inputs)
        cache.advance(tokens.shape[1])
        return self.norm(x)


class Numbered(GPT):
    """The blocks are called by their numbers."""

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        inputs = self.attention_inputs(tokens, cache)
        x = self.wte(tokens)
        for layer in range(self.config.n_layer):
            x = self.blocks[layer](x, *inputs)
        cache.advance(tokens.shape[1])
        return self.norm(x)


@pytest.mark.parametrize("kind", [Repeated, Numbered])
def test_blocks_that_are_called_in_another_way_stay(kind):
    model = random_model()
    model.__class__ = kind
    pack_linears(model)
    assert fuse_blocks(model) and len(model.blocks) == 2


CHANGES = [
    "another name", "another kind of norm", "a smaller norm", "a wider matrix", "a subclass of Linear",
    "an unknown mlp", "a norm without weights", "a hook",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_built_in_another_way_goes_its_own_way(change):
    model = random_model()
    block = model.blocks[1]
    if change == "another name":
        block.feed_forward = block.mlp
        del block.mlp
    elif change == "another kind of norm":
        block.mlp_norm = torch.nn.Identity()
    elif change == "a smaller norm":
        block.attention_norm = torch.nn.LayerNorm(16)
    elif change == "a wider matrix":
        block.mlp.down = torch.nn.Linear(256, 32)
    elif change == "a subclass of Linear":
        block.mlp.up = type("Scaled", (torch.nn.Linear,), {})(32, 128)
    elif change == "a norm without weights":
        block.mlp_norm = torch.nn.LayerNorm(32, elementwise_affine=False)
    elif change == "a hook":
        block.mlp.register_forward_hook(lambda *_: None)
    else:
        model.config.mlp = "mish"
    pack_linears(model)
    if change in ("a norm without weights", "a smaller norm", "a wider matrix"):  # else the call might read beyond it
        with pytest.raises(ValueError, match="of another size"):
            FusedBlocks(model.blocks, model.config)
    assert fuse_blocks(model) and len(model.blocks) == 2


@torch.inference_mode()
def test_whatever_the_call_cannot_do_the_blocks_do():
    model, plain = packed(True), packed(False)
    tokens = random_tokens(3, 24)  # more rows than the kernels are good for
    ours, theirs = model.make_cache(3), model.make_cache(3)
    assert torch.equal(model(tokens, cache=ours)[0], plain(tokens, cache=theirs)[0])
    assert torch.equal(ours.memory, theirs.memory)
    assert torch.equal(model(tokens[:1, :3])[0], plain(tokens[:1, :3])[0]), "without a cache"
    for cache in (ours := model.make_cache(1), theirs := model.make_cache(1)):
        cache.memory = cache.memory.transpose(-1, -2).contiguous().transpose(-1, -2)
    expected = plain(tokens[:1, :3], cache=theirs)[0]
    assert torch.equal(model(tokens[:1, :3], cache=ours)[0], expected), "a cache in another order"


@torch.inference_mode()
def test_the_call_takes_only_numbers_that_lie_as_it_reads_them():
    model = packed(True)
    fused, cache = model.blocks[0], model.make_cache(2)
    inputs, x = model.attention_inputs(random_tokens(2, 3), cache), torch.randn(2, 3, 32)
    assert fused.fits(x, *inputs)
    assert torch.equal(fused(x.mT.contiguous().mT, *inputs), fused(x, *inputs)), "hidden states in another order"
    assert not fused.train().fits(x, *inputs), "in training"
    assert fused.eval().fits(x, *inputs)
    positions, mask, rotation, _ = inputs
    other = model.make_cache(2)
    other.memory = other.memory.double()
    assert not fused.fits(x, positions, mask, rotation, other), "a cache of another dtype"
    cache.lengths, positions = [22, 22], torch.arange(22, 25)
    mask = torch.arange(25) <= positions[:, None]
    assert not fused.fits(x, positions, mask, rotation, cache), "beyond the cache"
