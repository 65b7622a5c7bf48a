"""Low-rank adapters (LoRA, arXiv 2106.09685) of a base model, and base and adapter merged into one model.

An adapter has a pair of matrices for each adapted slice of a linear layer. model.py keeps queries, keys and values in
one matrix, and SwiGLU's gate and up in another, but each of these slices has its own pair, as in peft.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nib.common.exits import InputError
from nib.formats.architectures import Architecture
from nib.formats.checkpoint import MODEL_FILE, BrokenCheckpoint, Checkpoint
from nib.formats.huggingface import HuggingFaceModel
from nib.formats.nanogpt import NanoGPTCheckpoint
from nib.formats.places import Shapes
from nib.tokenizer.tokenizer import Tokenizer

LAYERS = {"attention.qkv": ("q", "k", "v"), "attention.out": ("o",), "mlp.up": ("gate", "up"), "mlp.down": ("down",)}
TARGETS = [target for targets in LAYERS.values() for target in targets]


@dataclass
class Pair:
    """The weight W of a slice becomes W + scale B A: A (rank, inputs), B (outputs, rank)."""

    A: Tensor
    B: Tensor
    scale: float


Pairs = dict[str, Pair]  # by slice, such as blocks.0.attention.qkv.q


def slices(layer: str, rows: int, model: Mapping[str, Any]) -> dict[str, int]:
    """The slices of a linear layer with `rows` rows, and the rows of each; `model` has the fields of GPTConfig."""
    key_value = model["n_kv_head"] or model["n_head"]
    shares = dict.fromkeys(LAYERS[layer], 1)
    if layer == "attention.qkv":
        shares = {"q": model["n_head"], "k": key_value, "v": key_value}
    elif layer == "mlp.up" and model["mlp"] != "swiglu":
        shares = {"up": 1}
    return {target: rows * share // sum(shares.values()) for target, share in shares.items()}


def adapted_layers(shapes: Shapes, model: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The slices of each linear layer that an adapter can change, such as blocks.0.attention.qkv: q, k and v."""
    found = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        layer = module.split(".", 2)[-1]
        if module.startswith("blocks.") and kind == "weight" and layer in LAYERS:
            found[module] = slices(layer, shape[0], model)
    return found


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of the weights as float32, which identifies a base in any file format."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().float().contiguous().cpu().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def checkpoint_pairs(checkpoint: Checkpoint) -> Pairs:
    """The adapter in a checkpoint of a LoRA run. Raises BrokenCheckpoint."""
    tensors, about = checkpoint.weights(), checkpoint.state["adapter"]
    try:
        scale = about["alpha"] / about["rank"]
        names = {name.rpartition(".")[0] for name in tensors}
        return {name: Pair(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], scale) for name in names}
    except (KeyError, TypeError, ZeroDivisionError):
        raise BrokenCheckpoint(f"{checkpoint.directory / MODEL_FILE} lacks parts of its adapter. Use another") from None


class AdaptedModel:
    """A base and an adapter as one source with merged weights. `adapter` is a Checkpoint or a PeftAdapter."""

    def __init__(self, base: Checkpoint | HuggingFaceModel | NanoGPTCheckpoint | AdaptedModel, adapter: Any) -> None:
        self.base, self.adapter = base, adapter
        self.directory: Path = adapter.directory
        # The run may have lengthened the context of its base.
        self.model_config: dict[str, Any] = getattr(adapter, "model_config", base.model_config)
        self.architecture: Architecture | None = getattr(base, "architecture", None)
        self.state: dict[str, Any] = getattr(adapter, "state", {})

    def tokenizer(self) -> Tokenizer:
        return (self.adapter if isinstance(self.adapter, Checkpoint) else self.base).tokenizer()

    def base_weights(self, shapes: Shapes) -> dict[str, Tensor]:
        """The weights of the base. Raises InputError if their checksum is not the one that the adapter records."""
        weights = self.base.weights() if isinstance(self.base, Checkpoint) else self.base.weights(shapes)
        expected = self.state["adapter"].get("base_sha256") if self.state else self.adapter.base_sha256
        if expected and expected != weights_checksum(weights):
            what = f"{self.directory} was trained on another base than {self.base.directory}"
            raise InputError(f"{what}: the checksum of its weights differs. Give the base it was trained on")
        return weights

    def pairs(self, shapes: Shapes) -> Pairs:
        """The adapter's pairs. Raises InputError if their slices or shapes do not fit the base."""
        if isinstance(self.adapter, Checkpoint):
            pairs = checkpoint_pairs(self.adapter)
        else:
            pairs = self.adapter.pairs(self.base, shapes)
        rest = dict(pairs)
        for module, sizes in adapted_layers(shapes, self.model_config).items():
            inputs = shapes[f"{module}.weight"][1]
            for target, rows in sizes.items():
                pair = rest.pop(f"{module}.{target}", None)
                if pair and (pair.A.shape[1:], pair.B.shape[:1], len(pair.A)) != ((inputs,), (rows,), pair.B.shape[1]):
                    has = f"{list(pair.B.shape)} times {list(pair.A.shape)}"
                    what = f"{self.directory} has {has} for {module}.{target}, the base {rows} x {inputs}"
                    raise InputError(f"{what}. Give the base it was trained on")
        if rest:
            raise InputError(f"{self.directory} adapts {min(rest)}, which {self.base.directory} lacks. Give its base")
        return pairs

    def weights(self, shapes: Shapes) -> dict[str, Tensor]:
        """The weights of the base with the adapter merged; the adapted ones are float32. Raises InputError."""
        weights, pairs = self.base_weights(shapes), self.pairs(shapes)
        for module, sizes in adapted_layers(shapes, self.model_config).items():
            if any(f"{module}.{target}" in pairs for target in sizes):
                whole = weights[f"{module}.weight"].to(torch.float32, copy=True)
                for target, rows in zip(sizes, whole.split(list(sizes.values())), strict=True):
                    if pair := pairs.get(f"{module}.{target}"):
                        rows += pair.B.float() @ pair.A.float() * pair.scale
                weights[f"{module}.weight"] = whole
        return weights
