"""Which tensors of a Hugging Face architecture make up each parameter of model.py: names, shapes, order of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nib.formats.architectures import Architecture


def parameter_shapes(model: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The parameters that model.GPT has with these settings, and their shapes."""
    V, T, C, M = (model[name] for name in ("vocab_size", "block_size", "n_embd", "mlp_hidden"))
    H, K, D = model["n_head"], model["n_kv_head"], model["head_size"]
    up = 2 * M if model["mlp"] == "swiglu" else M
    linear = {"attention.qkv": ((H + 2 * K) * D, C), "attention.out": (C, H * D), "mlp.up": (up, C), "mlp.down": (C, M)}
    norms = {"attention_norm": C, "mlp_norm": C}
    heads = {"attention.q_norm": D, "attention.k_norm": D} if model["qk_norm"] else {}
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C)}
    if model["position"] == "learned":
        shapes["wpe.weight"] = (T, C)
    for layer in range(model["n_layer"]):
        for name, shape in {**linear, **{name: (size,) for name, size in (norms | heads).items()}}.items():
            shapes[f"blocks.{layer}.{name}.weight"] = shape
            if model["bias"] and (name in linear or (name in norms and model["norm"] == "layernorm")):
                shapes[f"blocks.{layer}.{name}.bias"] = shape[:1]
    shapes["norm.weight"] = (C,)
    if model["bias"] and model["norm"] == "layernorm":
        shapes["norm.bias"] = (C,)
    if not model["tie_weights"]:
        shapes["head.weight"] = (V, C)
    return shapes


@dataclass(frozen=True)
class Place:
    """Where one parameter of ours lies in theirs: the parts of its rows, each under its name."""

    ours: str
    shape: tuple[int, ...]
    parts: list[tuple[str, tuple[int, ...]]]  # name and shape, as stored
    transposed: bool


def plain_name(stored: str) -> str:
    """A tensor's name without what torch.compile, DDP, FSDP and checkpoint_wrapper put into it."""
    return re.sub(r"^(module\.|_orig_mod\.)+|_orig_mod\.|_(fsdp|checkpoint)_wrapped_module\.", "", stored)


def places(architecture: Architecture, model: dict[str, Any]) -> Iterator[Place]:
    """Every parameter of a model of this architecture, with its names in both."""
    for ours, shape in parameter_shapes(model).items():
        module, _, kind = ours.rpartition(".")
        layer = re.match(r"blocks\.(\d+)\.", module)
        general = re.sub(r"^blocks\.\d+\.", "blocks.N.", module)
        theirs = [name.replace(".N.", f".{layer[1]}.") if layer else name for name in architecture.names[general]]
        rows = [shape[0] // len(theirs)] * len(theirs)
        if len(theirs) == 3:
            rows = [heads * model["head_size"] for heads in (model["n_head"], model["n_kv_head"], model["n_kv_head"])]
        turned = architecture.transposed and len(shape) == 2 and layer is not None
        parts = [(f"{name}.{kind}", (count, *shape[1:])) for name, count in zip(theirs, rows, strict=True)]
        yield Place(ours, shape, [(name, size[::-1] if turned else size) for name, size in parts], turned)
