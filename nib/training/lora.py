"""Low-rank adaptation (LoRA, arXiv 2106.09685): the weights are frozen, and each slice gets a trained low-rank update.

`add_adapter` changes a model so that it can be trained like any other. A new adapter has B = 0 and changes no output.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nib.common.exits import InputError
from nib.formats.adapter import TARGETS, adapted_layers, weights_checksum
from nib.formats.checkpoint import KEEP_FILE, BrokenCheckpoint, Checkpoint
from nib.formats.load import Source
from nib.training.settings import TrainSettings

MARK = ".lora_"  # in the names of the trained parameters
NOT_TARGETS = ("wte", "wpe", "head", "lm_head", "embed_tokens", "embedding")


class Pair(nn.Module):
    """A (rank, inputs), initialised as in peft, and B (outputs, rank), zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, inputs))
        if self.lora_A.device == generator.device:  # not on the meta device
            nn.init.uniform_(self.lora_A, -(inputs**-0.5), inputs**-0.5, generator)
        self.lora_B = nn.Parameter(torch.zeros(outputs, rank))


class LoraLinear(nn.Module):
    """A frozen linear layer with a Pair for each target slice; `sizes` are the rows of all its slices."""

    def __init__(
        self, base: nn.Linear, sizes: dict[str, int], targets: set[str], rank: int, scale: float, dropout: float,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.bias = base.weight, base.bias  # the same names as in checkpoints of the base
        self.sizes, self.rank, self.scale, self.dropout = sizes, rank, scale, dropout
        self.targets = [target for target in sizes if target in targets]
        for target in self.targets:
            self.add_module(target, Pair(base.in_features, sizes[target], rank, generator))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        pairs = {target: getattr(self, target) for target in self.targets}
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        low = F.linear(dropped, torch.cat([pair.lora_A for pair in pairs.values()])) * self.scale  # (..., pairs x rank)
        parts = dict(zip(pairs, low.split(self.rank, dim=-1), strict=True))
        deltas = [
            F.linear(parts[target], pairs[target].lora_B) if target in pairs else y.new_zeros(*y.shape[:-1], size)
            for target, size in self.sizes.items()
        ]
        return y + (torch.cat(deltas, dim=-1) if len(deltas) > 1 else deltas[0])


def read_targets(text: str) -> set[str]:
    """The targets in a text such as q,v or all. Raises InputError."""
    targets = {target.strip() for target in text.split(",") if target.strip()}
    for target in sorted(targets - {"all", *TARGETS}):
        why = "an embedding or head is not adapted" if target in NOT_TARGETS else "there is none of this name"
        raise InputError(f"lora_targets has {target!r}: {why}. Choose from {','.join(TARGETS)}, or all")
    if not targets:
        raise InputError(f"lora_targets is empty. Choose from {','.join(TARGETS)}, or all")
    return targets


def add_adapter(model: Any, settings: TrainSettings) -> None:
    """Freeze the model, and add a Pair to each slice of the linear layers of its blocks that lora_targets names.

    Raises InputError for a target that the model lacks, and for a rank larger than a side of a matrix.
    """
    generator, wanted = torch.Generator().manual_seed(settings.seed), read_targets(settings.lora_targets)
    rank = settings.lora_rank
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layers = adapted_layers(shapes, vars(model.config))
    has = {target for sizes in layers.values() for target in sizes}
    if "all" not in wanted and wanted - has:
        which = ",".join(target for target in TARGETS if target in has)
        raise InputError(f"lora_targets has {min(wanted - has)!r}, which the model lacks. It has {which}")
    model.requires_grad_(False)
    for module, sizes in layers.items():
        base = model.get_submodule(module)
        if type(base) is not nn.Linear or base.out_features != sum(sizes.values()):
            raise InputError(f"{module} of this model.py is not a plain linear layer. Use lora_rank=0")
        if not (own := {target for target in sizes if target in wanted or "all" in wanted}):
            continue
        most = min(base.in_features, *(sizes[target] for target in own))
        if rank > most:
            raise InputError(f"lora_rank {rank} is too large for {module}, at most {most}. Lower it")
        adapted = LoraLinear(base, sizes, own, rank, settings.lora_alpha / rank, settings.lora_dropout, generator)
        model.set_submodule(module, adapted)


def adapt(model: Any, base: Source | None, settings: TrainSettings, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Add the settings' adapter to a model with the weights of `base`, and load it from the checkpoint, if any.

    Returns the description of adapter and base that is stored in checkpoints. Raises InputError.
    """
    assert base is not None
    about = {
        "rank": settings.lora_rank, "alpha": settings.lora_alpha, "targets": settings.lora_targets,
        "base": settings.init_from, "base_directory": str(base.directory.resolve()),
        "base_sha256": weights_checksum(model.state_dict()),
    }  # fmt: skip
    add_adapter(model, settings)
    if isinstance(base, Checkpoint):
        with contextlib.suppress(OSError):  # another user's, perhaps
            (base.directory / KEEP_FILE).touch()
    if checkpoint is not None:
        before = checkpoint.state.get("adapter", {}).get("base_sha256")
        if before != about["base_sha256"]:
            what = f"{base.directory} is not the base that the run in {settings.out_dir} began with"
            raise InputError(f"{what}: the checksum of its weights differs. Give another --out_dir")
        tensors = checkpoint.weights()
        own = {name: parameter.shape for name, parameter in model.named_parameters() if MARK in name}
        if {name: tensor.shape for name, tensor in tensors.items()} != own:
            raise BrokenCheckpoint(f"{checkpoint.directory} holds another adapter than this run's. Use another")
        model.load_state_dict(tensors, strict=False)
    return about
