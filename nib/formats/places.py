"""Which tensors of a Hugging Face architecture make up each parameter of model.py: names, shapes, order of rows."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nib.common.exits import InputError
from nib.formats.architectures import LINEAR, Architecture

Shapes = dict[str, tuple[int, ...]]  # of parameters of model.py, by name
# Buffers that older versions stored with the weights.
NOT_WEIGHTS = re.compile(r".*\.attn\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Place:
    """The tensors of an architecture that, concatenated by rows, make up one parameter of model.py."""

    ours: str
    parts: list[tuple[str, tuple[int, ...]]]  # name and shape, as stored
    transposed: bool


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def plain_name(stored: str) -> str:
    """A tensor's name without the parts that torch.compile, DDP, FSDP and checkpoint_wrapper add."""
    return re.sub(r"^(module\.|_orig_mod\.)+|_orig_mod\.|_(fsdp|checkpoint)_wrapped_module\.", "", stored)


def has_bias(architecture: Architecture, model: dict[str, Any], layer: str) -> bool:
    """Whether this layer has a bias in the architecture, for a model with these settings of GPTConfig."""
    if layer in LINEAR:
        return bool(model["bias"]) or layer in architecture.always_bias
    return layer.endswith("norm") and model["norm"] == "layernorm"


def places(architecture: Architecture, model: dict[str, Any], shapes: Shapes) -> Iterator[Place]:
    """The Place of each parameter of model.py. Raises InputError for one that the architecture lacks."""
    for ours, shape in shapes.items():
        module, _, kind = ours.rpartition(".")
        number, layer = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", module).groups()  # type: ignore[union-attr]
        theirs = architecture.names.get(layer if number is None else f"blocks.N.{layer}")
        if not theirs or not (kind == "weight" or (kind == "bias" and has_bias(architecture, model, layer))):
            raise InputError(
                f"this model.py has the parameter {ours}, which {architecture.name} lacks. "
                "Use nib's own checkpoints, or a model.py without it"
            )
        heads = [model["n_head"], *[model["n_kv_head"] or model["n_head"]] * 2]
        shares = heads if len(theirs) == 3 else [1] * len(theirs)
        rows = [shape[0] * share // sum(shares) for share in shares]
        turned = architecture.transposed and len(shape) == 2 and number is not None
        names = [f"{name.replace('.N.', f'.{number}.')}.{kind}" for name in theirs]
        parts = [(name, (count, *shape[1:])) for name, count in zip(names, rows, strict=True)]
        yield Place(ours, [(name, size[::-1] if turned else size) for name, size in parts], turned)


class ImportedModel:
    """A model that another program wrote: its settings for GPTConfig, and its tensors by plain name."""

    directory: Path
    architecture: Architecture
    model_config: dict[str, Any]
    tensors: dict[str, Stored]
    without_bias: frozenset[str] = frozenset()  # layers without a bias, although `model_config` has bias=True

    def weights(self, shapes: Shapes) -> dict[str, Tensor]:
        """The parameters of a model with these shapes, in the dtype of the file. Raises InputError."""
        return {name: read() for name, read in self.match(shapes).items()}

    def match(self, shapes: Shapes) -> dict[str, Callable[[], Tensor]]:
        """A function that reads each parameter.

        Raises InputError if a tensor is missing, has the wrong shape, or is left over.
        """
        found: dict[str, Callable[[], Tensor]] = {}
        rest, embedding = dict(self.tensors), self.architecture.names["wte"][0] + ".weight"
        is_tied = self.model_config["tie_weights"]
        if is_tied and embedding not in rest and "lm_head.weight" in rest:  # only one of the two names was stored
            rest[embedding] = rest.pop("lm_head.weight")
        tied = rest.get(embedding)
        for place in places(self.architecture, self.model_config, shapes):
            if place.ours.endswith(tuple(f"{layer}.bias" for layer in self.without_bias)):
                found[place.ours] = functools.partial(torch.zeros, shapes[place.ours])
                continue
            parts = []
            for name, shape in place.parts:
                if name not in rest:
                    raise self.wrong(f"the tensor {name} is missing")
                parts.append(rest.pop(name))
                if parts[-1].shape != shape:
                    has, wanted = list(parts[-1].shape), list(shape)
                    raise self.wrong(f"{name} has the shape {has}, but the model's settings need {wanted}")
            found[place.ours] = functools.partial(joined, parts, place.transposed)
        head = rest.pop("lm_head.weight", None) if is_tied else None
        if head and tied and not torch.equal(head.read(), tied.read()):
            raise self.wrong("its head is tied to its embedding, but lm_head.weight is another matrix")
        strange = sorted(name for name in rest if not NOT_WEIGHTS.fullmatch(name))
        if strange:
            raise self.wrong(f"the tensor {strange[0][:80]} is not part of {self.architecture.name}")
        return found

    def wrong(self, what: str) -> InputError:
        return InputError(f"{self.directory}: {what}. Give a complete, unchanged model")


def joined(parts: list[Stored], transposed: bool) -> Tensor:
    whole = parts[0].read() if len(parts) == 1 else torch.cat([part.read() for part in parts])
    return whole.T.contiguous() if transposed else whole
