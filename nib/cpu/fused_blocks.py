"""All blocks of a model in one call of blocks.c, for the few new positions of a sampling step.

model.py defines the model: before the call is used, its results are compared with those of the model's own blocks, at
the beginning and at the end of a context. If they differ, the model keeps its own blocks. Changes that depend on the
input, such as a limit on large activations, may escape this check.
"""

from __future__ import annotations

import ctypes
import dataclasses
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nib.cpu.build import MOST_ROWS, Matrix, kernels, made_kernels
from nib.cpu.linear import pack_linears
from nib.cpu.threads import free_threads

TORCH = Path(torch.__file__).parent
MLPS = ("gelu", "gelu_tanh", "relu", "relu2", "swiglu")  # in the order of their numbers in blocks.c
CHECKED = 64  # positions
MOST_NUMBERS = 2**26  # keys and values in the check of a whole context: 256 MB
# Scale of the random keys of a whole context: SmolLM2's own blocks differ from float64 by 8e-5 at 1, by 6e-6 at 0.1.
FAR_KEYS = 0.1
DIFFER = "their results differ from those of blocks.c"
TOLERANCE = 1e-4  # of the largest number: reordered float32 sums differ by 1e-6, real differences by more than this


class Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias")]


class Block(ctypes.Structure):
    _fields_ = [
        ("attention_norm", Norm), ("q_norm", Norm), ("k_norm", Norm), ("qkv", Matrix), ("out", Matrix),
        ("mlp_norm", Norm), ("up", Matrix), ("down", Matrix),
    ]  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("blocks", "width", "heads", "kv_heads", "head_size", "hidden")),
        *((name, ctypes.c_long) for name in ("window", "mlp", "rms")), ("eps", ctypes.c_float),
    ]  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_long) for name in ("count", "tokens", "places")),
        *((name, ctypes.c_void_p) for name in ("positions", "cos", "sin", "keys", "values")), ("length", ctypes.c_long),
    ]  # fmt: skip


class FusedBlocks(nn.Module):
    """The blocks of a packed model in one call; its own blocks compute what the call does not support."""

    def __init__(self, blocks: Any, config: Any) -> None:
        """Raises AttributeError, KeyError or ValueError for blocks that differ in structure from model.Block."""
        super().__init__()
        native = kernels()
        assert native is not None
        if any(module._forward_hooks or module._forward_pre_hooks for module in blocks.modules()):
            raise ValueError("a hook would not be called")
        self.blocks, self.library = blocks, native.library
        self.most_rows = MOST_ROWS[blocks[0].mlp.up.weight.dtype]
        self.kept: list[object] = []  # keeps alive the tensors whose addresses are used
        self.shape = Shape(
            len(blocks), config.n_embd, config.n_head, config.n_kv_head, config.head_size, config.mlp_hidden,
            config.window, MLPS.index(config.mlp), config.norm == "rmsnorm", config.norm_eps,
        )  # fmt: skip
        self.parts = (Block * len(blocks))(*(self.part(block) for block in blocks))

    def part(self, block: Any) -> Block:
        attention, shape, wide = block.attention, self.shape, 2 if MLPS[self.shape.mlp] == "swiglu" else 1
        C, D, H, K = shape.width, shape.head_size, shape.heads, shape.kv_heads
        norms = self.norm(block.attention_norm, C), self.norm(attention.q_norm, D), self.norm(attention.k_norm, D)
        qkv, out = self.matrix(attention.qkv, (H + 2 * K) * D, C), self.matrix(attention.out, C, H * D)
        up, down = self.matrix(block.mlp.up, wide * shape.hidden, C), self.matrix(block.mlp.down, C, shape.hidden)
        return Block(*norms, qkv, out, self.norm(block.mlp_norm, C), up, down)

    def norm(self, module: Any, size: int) -> Norm:
        if module is None:
            return Norm()
        parts = [module.weight, getattr(module, "bias", None)]
        given = [each for each in parts if each is not None]
        if parts[0] is None or any(each.shape != (size,) or each.dtype != torch.float32 for each in given):
            raise ValueError("a norm of another size")
        parts = [None if each is None else each.detach().contiguous() for each in parts]
        self.kept += parts
        return Norm(*map(address, parts))

    def matrix(self, module: Any, N: int, K: int) -> Matrix:
        matrix: Matrix = module.few_rows.matrix
        if (matrix.n, matrix.k) != (N, K):
            raise ValueError("a matrix of another size")
        self.kept.append(matrix)
        return matrix

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor | None, rotation: list[Tensor], cache: Any) -> Tensor:
        """Hidden states (B, T, C) through all blocks."""
        if not self.fits(x, positions, mask, rotation, cache):
            for block in self.blocks:
                x = block(x, positions, mask, rotation, cache)
            return x
        B, T, _ = x.shape
        x = x.clone(memory_format=torch.contiguous_format)
        places = [positions, *(rotation or (None, None))]
        places = [None if each is None else each.contiguous() for each in places]
        keys, values = cache.memory
        length = cache.memory.shape[-2]
        batch = Batch(B * T, T, places[0].numel(), *map(address, places), address(keys), address(values), length)
        shape, threads = ctypes.byref(self.shape), free_threads(torch.get_num_threads())
        between = x.new_empty(self.library.scratch(shape, B * T, length, threads))
        self.library.blocks(shape, self.parts, ctypes.byref(batch), address(x), address(between), threads)
        return x

    def fits(self, x: Tensor, positions: Tensor, mask: Tensor | None, rotation: list[Tensor], cache: Any) -> bool:
        """Whether there are few rows, and shapes, dtypes and memory layout are those that blocks.c expects."""
        (B, T, C), shape = x.shape, self.shape
        memory = getattr(cache, "memory", None)
        if memory is None or self.most_rows < B * T or self.training:
            return False
        *outer, length, D = memory.shape
        return (
            x.dtype == memory.dtype == torch.float32
            and memory.is_contiguous()
            and (C, D, outer) == (shape.width, shape.head_size, [2, shape.blocks, B, shape.kv_heads])
            and max(cache.lengths) + T <= length
            and self.follows(positions, mask, cache.lengths, B, T)
            and all(
                turn.dtype == torch.float32 and turn.numel() == positions.numel() * shape.head_size for turn in rotation
            )
        )

    def follows(self, positions: Tensor, mask: Tensor | None, lengths: list[int], B: int, T: int) -> bool:
        """Whether the new positions follow the cached ones, and each sees all earlier ones in the window."""
        window = self.shape.window
        expected = [length + t for length in lengths for t in range(T)]
        if positions.dtype != torch.int64 or positions.expand(B, T).flatten().tolist() != expected:
            return False
        if mask is not None and mask.dtype != torch.bool:
            return False
        every = sum(expected) + B * T  # (query, key) pairs without a window
        seen = every if mask is None else int(mask.sum()) * (B if mask.ndim == 2 else 1)
        return seen == (sum(min(position + 1, window) for position in expected) if window else every)


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def computes_otherwise(GPT: Any, config: Any) -> bool:
    """Whether the blocks of a changed model.py compute something else than nib's, seen on a small random model.

    False if that cannot be known: without a C compiler, or with blocks of another structure.
    """
    small = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=64, mlp_hidden=64, vocab_size=32)
    try:
        model = GPT(dataclasses.replace(config, **small, block_size=min(config.block_size, 128)))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return pack_linears(model) and fuse_blocks(model) == DIFFER
    except Exception:  # a changed model.py may raise anything
        return False


def fuse_blocks(model: Any) -> str:
    """Replace the blocks of a packed model on the CPU by one call.

    Returns "", or the reason why the model was not changed.
    """
    if kernels() is None:
        return made_kernels()[1]
    blocks, was_training, agreed = model.blocks, model.training, False
    reason = DIFFER
    model.eval()
    try:
        fused = nn.ModuleList([FusedBlocks(blocks, model.config)]).eval()
        agreed = outputs_agree(model, fused)
    except Exception as error:  # a model with another structure may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if TORCH not in Path(frame.filename).parents][-1]
        place = f"{Path(ours.filename).name}, line {ours.lineno}"
        said = " ".join("".join(traceback.format_exception_only(error)).split())
        reason = f"{said[:200]} ({place})"
    finally:
        model.blocks = fused if agreed else blocks
        model.train(was_training)
    return "" if agreed else reason


@torch.inference_mode()
def outputs_agree(model: Any, fused: nn.ModuleList) -> bool:
    """Whether hidden states and cache are the same with `fused` as with the model's blocks.

    First two rows get two new positions each: one row is empty, the other has as many random keys as fit. Then one row
    gets the last position of a whole context. On return model.blocks may be either of the two.
    """
    few = min(model.config.block_size, CHECKED)
    T = min(2, few)
    whole = max(few, min(model.config.block_size, MOST_NUMBERS // model.make_cache(1, 1).memory.numel()))
    generator = torch.Generator().manual_seed(0)
    blocks = model.blocks
    for lengths, new, size in (([0, few - T], T, few), ([whole - 1], 1, whole)):
        tokens = torch.randint(model.config.vocab_size, (len(lengths), new), generator=generator)
        cache = model.make_cache(len(lengths), size)
        *outer, length, D = cache.memory.shape
        heads, positions = (torch.randn(shape, generator=generator) for shape in ((*outer, 1, D), (length, D)))
        torch.mul(heads, positions, out=cache.memory)  # faster than drawing so many random numbers
        if lengths == [whole - 1]:
            cache.memory[0] *= FAR_KEYS
        newest = cache.memory[..., -CHECKED:, :]
        before, found = newest.clone(), []
        for model.blocks in (blocks, fused):
            cache.lengths = list(lengths)
            newest.copy_(before)
            found.append((model.hidden(tokens, cache), newest.clone()))
        if not all(
            bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())
            for theirs, ours in zip(*found, strict=True)
        ):
            return False
    return True
