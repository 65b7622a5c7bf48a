"""Read and write adapter directories of Hugging Face's peft: adapter_config.json and adapter_model.safetensors.

The package peft is not needed. A setting of its config that nib does not support is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nib.common.device import cast
from nib.common.exits import InputError
from nib.common.files import read_object
from nib.formats.adapter import AdaptedModel, Pair, Pairs, adapted_layers
from nib.formats.architectures import Architecture, choose_architecture
from nib.formats.places import Shapes, places

CONFIG_FILE, WEIGHTS_FILE, PICKLED_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# The keys of adapter_config.json that are read, and those that do not change the result (the tensors show which modules
# are adapted). All other keys must be empty.
READ = set("r lora_alpha rank_pattern alpha_pattern use_rslora base_model_name_or_path".split())
SILENT = set(
    """peft_type task_type auto_mapping peft_version revision inference_mode target_modules exclude_modules
    lora_dropout fan_in_fan_out init_lora_weights layers_to_transform layers_pattern megatron_core qalora_group_size
    runtime_config bias""".split()
)
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")  # initialisations that do not change the base


def is_peft(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file()


class PeftAdapter:
    """A peft directory. Raises InputError if it is damaged or not a LoRA adapter."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.config = read_object(directory / CONFIG_FILE, 1 << 24)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise self.wrong(f"cannot read {CONFIG_FILE}: {str(reason)[:120]}") from None
        config = self.config
        if config.get("peft_type") != "LORA":
            raise self.refuse(f"the kind {str(config.get('peft_type'))[:40]!r}")
        if config.get("init_lora_weights") not in PLAIN_STARTS:
            raise self.refuse(f"init_lora_weights = {str(config['init_lora_weights'])[:40]!r}")
        if config.get("bias", "none") != "none":
            raise self.refuse(f"bias = {str(config['bias'])[:40]!r}")
        for key, value in config.items():
            if value and key not in READ | SILENT:
                raise self.refuse(f"{key[:40]} = {str(value)[:40]!r}")
        for key in ("rank_pattern", "alpha_pattern"):
            if not all(is_safe(pattern) for pattern in dict(config.get(key) or {})):
                raise self.refuse(f"the {key} {str(config[key])[:80]}")
        self.tensors, self.base_sha256 = self._read()

    @property
    def base(self) -> str:
        """The name of the base when the adapter was trained."""
        name = self.config.get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise self.wrong("it does not name its base. Give the base first, and this as --adapter", "")
        return name

    def _read(self) -> tuple[dict[str, Tensor], str]:
        path = self.directory / WEIGHTS_FILE
        if not path.is_file():
            pickled = f"{PICKLED_FILE} is pickled, and " if (self.directory / PICKLED_FILE).exists() else ""
            raise self.wrong(f"{pickled}there is no {WEIGHTS_FILE}", "Save the adapter as safetensors")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
                return tensors, (file.metadata() or {}).get("base_sha256", "")
        except (SafetensorError, OSError, ValueError) as error:
            raise self.wrong(f"cannot read {WEIGHTS_FILE}: {str(error)[:120]}", "Copy the adapter again") from None

    def pairs(self, base: Any, shapes: Shapes) -> Pairs:
        """The adapter's pairs by nib's slices; `shapes` are the base's parameters. Raises InputError."""
        rest = {name.removeprefix(PREFIX): tensor for name, tensor in self.tensors.items()}
        found: Pairs = {}
        for module, name, sizes in their_modules(base, shapes):
            A, B = (rest.pop(f"{name}.lora_{side}.weight", None) for side in "AB")
            if A is not None and B is not None:
                pair = self.pair(name, A, B, (sum(sizes.values()), shapes[f"{module}.weight"][1]))
                for target, part in zip(sizes, pair.B.split(list(sizes.values())), strict=True):
                    found[f"{module}.{target}"] = Pair(pair.A, part, pair.scale)
            elif A is not None or B is not None:
                raise self.wrong(f"one of the two matrices of {name} is missing", "Copy the adapter again")
        if rest:
            kind = "the embedding or head" if re.search(r"embed|lm_head|wte|wpe", min(rest)) else "it"
            raise self.wrong(f"{min(rest)[:100]} does not fit {base.directory}: nib does not adapt {kind}")
        if not found:
            raise self.wrong("there is no pair of matrices in it")
        return found

    def pair(self, name: str, A: Tensor, B: Tensor, shape: tuple[int, int]) -> Pair:
        rank = self.number("r", "rank_pattern", name)
        if rank < 1 or rank > min(shape) or rank != int(rank):
            raise self.wrong(f"the rank of {name} is {rank:g}, not from 1 to {min(shape)}")
        if A.shape != (rank, shape[1]) or B.shape != (shape[0], rank):
            has, wanted = (list(A.shape), list(B.shape)), ([int(rank), shape[1]], [shape[0], int(rank)])
            raise self.wrong(f"the matrices of {name} are {has[0]} and {has[1]}, not {wanted[0]} and {wanted[1]}")
        alpha = self.number("lora_alpha", "alpha_pattern", name)
        return Pair(A, B, alpha / (rank**0.5 if self.config.get("use_rslora") else rank))

    def number(self, key: str, patterns: str, name: str) -> float:
        """The value of `key` for a module: that of the first pattern matching the end of its name, as in peft."""
        value = self.config.get(key, 8)
        for pattern, other in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                value = other
                break
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
            raise self.wrong(f"{key} of {name} is {str(value)[:40]!r}, not a number")
        return value

    def wrong(self, what: str, how: str = "Give the base and the adapter as they were trained") -> InputError:
        return InputError(f"{self.directory}: {what}. {how}".removesuffix(". "))

    def refuse(self, what: str) -> InputError:
        how = "Merge the adapter with peft, and give the merged model"
        return InputError(f"{self.directory} needs {what}, which nib does not support. {how}")


def is_safe(pattern: str) -> bool:
    """Whether a regular expression is valid and cannot backtrack without end: no repeated groups, few repeats."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    return len(pattern) < 200 and not re.search(r"\)[*+?{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 3


def their_modules(base: Any, shapes: Shapes) -> Iterator[tuple[str, str, dict[str, int]]]:
    """The architecture's linear modules: the layer of model.py that each is in, its name, its slices and their rows.

    GPT-2 has one module for queries, keys and values; the others have one for each slice.
    """
    layers = adapted_layers(shapes, base.model_config)
    for place in places(architecture_of(base), base.model_config, shapes):
        module = place.ours.removesuffix(".weight")
        if sizes := layers.get(module):
            each = [{target: rows} for target, rows in sizes.items()]
            for (name, _), own in zip(place.parts, [sizes] if len(place.parts) == 1 else each, strict=True):
                yield module, name.removesuffix(".weight"), own


def architecture_of(base: Any) -> Architecture:
    """The architecture of a Hugging Face model, or the one in which export.py would write another model."""
    found = getattr(base, "architecture", None)
    return found if isinstance(found, Architecture) else choose_architecture(base.model_config)


def write_peft(source: AdaptedModel, shapes: Shapes, directory: Path, dtype: torch.dtype | None) -> None:
    """Write the adapter of a source into a directory, as peft does. Raises InputError, OSError."""
    pairs, base = source.pairs(shapes), source.base
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for module, name, sizes in their_modules(base, shapes):
        own = {target: pairs[f"{module}.{target}"] for target in sizes if f"{module}.{target}" in pairs}
        if own:
            A, B, alpha = as_one_pair(own, sizes)
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
            ranks[name], alphas[name] = len(A), alpha
    tensors = {name: cast(tensor, dtype or tensor.dtype, name).contiguous() for name, tensor in tensors.items()}
    rank, alpha = min(ranks.values()), min(alphas.values())
    # peft adapts every module whose name ends in a target. GPT-2 has two called c_proj: attn.c_proj and mlp.c_proj.
    paths = [name.split(".") for _, name, _ in their_modules(base, shapes)]
    others = {path[-1] for path in paths if ".".join(path) not in ranks}
    targets = {".".join(path[-2:] if path[-1] in others else path[-1:]) for path in paths if ".".join(path) in ranks}
    name = source.state.get("adapter", {}).get("base") or str(base.directory)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "inference_mode": True,
        "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(targets), "use_rslora": False,
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
        "fan_in_fan_out": architecture_of(base).transposed, "modules_to_save": None,
    }  # fmt: skip
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    metadata = {"format": "pt", "base_sha256": str(source.state.get("adapter", {}).get("base_sha256", ""))}
    save_file(tensors, directory / WEIGHTS_FILE, metadata)


def as_one_pair(own: Pairs, sizes: dict[str, int]) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha of one module of peft's, which holds one slice of nib's or all slices of a layer.

    For several slices the matrices A are stacked, and B is block-diagonal: the rank is the sum of theirs.
    """
    A = torch.cat([pair.A for pair in own.values()])
    scale = next(iter(own.values())).scale
    blocks = [torch.zeros(rows, 0) for rows in sizes.values()]
    for place, target in enumerate(sizes):
        if pair := own.get(target):
            blocks[place] = pair.B.float() * (pair.scale / scale)
    return A, torch.block_diag(*blocks), scale * len(A)
