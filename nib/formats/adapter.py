"""Low-rank adapters (LoRA, arXiv 2106.09685) of a base model, and base and adapter merged into one model.

An adapter has a pair of matrices for each adapted slice of a linear layer. model.py keeps queries, keys and values in
one matrix, and SwiGLU's gate and up in another, but each of these slices has its own pair, as in peft.
"""

from __future__ import annotations

import hashlib
import re
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

TARGETS = ["q", "k", "v", "o", "gate", "up", "down"]


@dataclass
class Pair:
    """The weight W of a slice becomes W + scale B A: A (rank, inputs), B (outputs, rank)."""

    A: Tensor
    B: Tensor
    scale: float


Pairs = dict[str, Pair]  # by slice, such as blocks.0.attention.qkv.q


def adapted_layers(shapes: Shapes, model: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The slices of each linear layer that an adapter can change, and their rows; `model` has the fields of GPTConfig.

    For example, blocks.0.attention.qkv has the slices q, k and v.
    """
    key_value = model["n_kv_head"] or model["n_head"]
    layers = {  # the slices of each kind of layer, and their shares of its rows
        "attention.qkv": {"q": model["n_head"], "k": key_value, "v": key_value},
        "attention.out": {"o": 1},
        "mlp.up": {"gate": 1, "up": 1} if model["mlp"] == "swiglu" else {"up": 1},
        "mlp.down": {"down": 1},
    }
    found = {}
    for name, shape in shapes.items():
        block = re.fullmatch(r"(blocks\.[^.]+\.(.+))\.weight", name)
        if block and (shares := layers.get(block[2])):
            found[block[1]] = {target: shape[0] * share // sum(shares.values()) for target, share in shares.items()}
    return found


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """The sha256 of the weights as float32, which identifies a base in any file format."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].detach().float().contiguous().cpu().numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


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

    def pairs(self, shapes: Shapes) -> Pairs:
        """The adapter's pairs. Raises InputError if their slices or shapes do not fit the base."""
        if not isinstance(self.adapter, Checkpoint):
            return self.adapter.pairs(self.base, shapes)
        tensors, about = self.adapter.weights(), self.state["adapter"]
        try:
            rank, scale = about["rank"], about["alpha"] / about["rank"]
            names = {name.rpartition(".")[0] for name in tensors}
            pairs = {name: Pair(tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"], scale) for name in names}
        except (KeyError, TypeError, ZeroDivisionError):
            raise BrokenCheckpoint(f"{self.directory / MODEL_FILE} lacks parts of its adapter. Use another") from None
        rest = dict(pairs)
        for module, sizes in adapted_layers(shapes, self.model_config).items():
            inputs = shapes[f"{module}.weight"][1]
            for target, rows in sizes.items():
                pair = rest.pop(f"{module}.{target}", None)
                if pair and (pair.A.shape, pair.B.shape) != ((rank, inputs), (rows, rank)):
                    has = f"{list(pair.B.shape)} times {list(pair.A.shape)}"
                    what = f"{self.directory} has {has} for {module}.{target}, the base {rows} x {inputs}"
                    raise InputError(f"{what}. Give the base it was trained on")
        if rest:
            raise InputError(f"{self.directory} adapts {min(rest)}, which {self.base.directory} lacks. Give its base")
        return pairs

    def weights(self, shapes: Shapes) -> dict[str, Tensor]:
        """The weights of the base with the adapter merged; the adapted ones are float32.

        Raises InputError, also if the checksum of the base is not the one that the adapter records.
        """
        weights = self.base.weights() if isinstance(self.base, Checkpoint) else self.base.weights(shapes)
        expected = self.state["adapter"].get("base_sha256") if self.state else self.adapter.base_sha256
        if expected and expected != weights_checksum(weights):
            what = f"{self.directory} was trained on another base than {self.base.directory}"
            place = self.state.get("adapter", {}).get("base_directory")
            before = f", which was {place}" if place else ""
            raise InputError(f"{what}: the checksum of its weights differs. Give the base it was trained on{before}")
        pairs = self.pairs(shapes)
        for module, sizes in adapted_layers(shapes, self.model_config).items():
            if any(f"{module}.{target}" in pairs for target in sizes):
                whole = weights[f"{module}.weight"].to(torch.float32, copy=True)
                for target, rows in zip(sizes, whole.split(list(sizes.values())), strict=True):
                    if pair := pairs.get(f"{module}.{target}"):
                        rows += pair.B.float() @ pair.A.float() * pair.scale
                weights[f"{module}.weight"] = whole
        return weights
