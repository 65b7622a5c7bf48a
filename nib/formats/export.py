"""Export a model: a directory that transformers and vLLM open without nib's code, a GGUF file, or a peft adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nib.common.device import DTYPES, cast
from nib.common.exits import InputError, RunError
from nib.common.files import new_directory
from nib.common.wording import counted
from nib.formats.adapter import AdaptedModel
from nib.formats.architectures import KNOWN, REMOVED, Architecture, choose_architecture, write_config_json
from nib.formats.gguf import check_gguf, write_gguf
from nib.formats.huggingface import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, HuggingFaceModel
from nib.formats.peft import write_peft
from nib.formats.places import Place, has_bias, places
from nib.tokenizer.huggingface import GENERATION_JSON, as_tokenizer_json, begin_of_text, read_settings, write_tokenizer

if TYPE_CHECKING:
    from nib.formats.load import Source
    from nib.tokenizer.tokenizer import Tokenizer

# The training settings that the model card shows.
CARD_KEYS = (
    "dataset seed batch_size block_size optimizer learning_rate muon_learning_rate weight_decay schedule".split()
)


def export(
    source: Source, config: Any, weights: dict[str, Tensor], out: Path,
    dtype: str = "auto", max_shard_bytes: int = 5 << 30, kind: str = "hf",
) -> str:  # fmt: skip
    """Write the model into the new directory `out`, which appears complete or not at all.

    `config` is the GPTConfig of the source's model, `kind` hf or gguf. Returns the name of its architecture. Raises
    InputError for a model that no architecture expresses, RunError for a full disk.
    """
    model, size = REMOVED | vars(config), sum(tensor.numel() for tensor in weights.values())
    if lacking := sorted(KNOWN - model.keys()):
        raise InputError(f"this model.py has no option {lacking[0]}, which decides the architecture. Put it back")
    for field in dataclasses.fields(config):
        if field.name not in KNOWN and model[field.name] != field.default:
            own, usual = (f"{field.name}={value}" for value in (model[field.name], field.default))
            raise InputError(f"no architecture of transformers has {own}. Export a model with {usual}")
    architecture, tokenizer = choose_architecture(model), source.tokenizer()
    content = as_tokenizer_json(tokenizer)
    if kind == "gguf":
        check_gguf(architecture, model, tokenizer, content)
    stored = weights["wte.weight"].dtype if dtype == "auto" else DTYPES[dtype]
    weights = with_biases(architecture, model, weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    tensors = their_tensors(places(architecture, model, shapes), weights)
    with new_output(out) as staging:
        if kind == "gguf":
            path = staging / f"{out.name}.gguf"
            write_gguf(path, architecture, model, tensors, stored, tokenizer, content)
        else:
            write_weights(tensors, stored, staging, max_shard_bytes)
            write_settings(architecture, source, model, tokenizer, stored, staging)
            write_tokenizer(tokenizer, staging, model["block_size"], content)
            card = model_card(source, architecture, model, size, tokenizer, out.name)
            (staging / "README.md").write_text(card, "utf-8")
            HuggingFaceModel(staging).match(shapes)  # check that the written model can be read
    return architecture.name


def export_adapter(source: AdaptedModel, weights: dict[str, Tensor], out: Path, dtype: str = "auto") -> str:
    """Write the adapter alone, as peft does, as `export` does a model. Returns "an adapter for peft"."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    with new_output(out) as staging:
        write_peft(source, shapes, staging, None if dtype == "auto" else DTYPES[dtype])
    return "an adapter for peft"


@contextlib.contextmanager
def new_output(out: Path) -> Iterator[Path]:
    """A directory that becomes `out` after the body. Raises InputError and RunError if it cannot be written."""
    try:
        with new_directory(out) as staging:
            yield staging
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"cannot write {out}: {error.strerror}. Give another directory") from None
    except (OSError, SafetensorError) as error:  # safetensors wraps OSErrors
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot write {out}: {reason}. Make room, or give another directory") from None


def with_biases(architecture: Architecture, model: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with zeros for biases that the architecture has and the model lacks."""
    whole: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        module, _, kind = name.rpartition(".")
        whole[name] = tensor
        if kind == "weight" and has_bias(architecture, model, re.sub(r"^blocks\.\d+\.", "", module)):
            whole[f"{module}.bias"] = weights.get(f"{module}.bias", torch.zeros(len(tensor)))
    return whole


def their_tensors(places: Iterable[Place], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under their names in the architecture, as views."""
    found: dict[str, Tensor] = {}
    for place in places:
        whole = weights[place.ours]
        parts = [whole.T] if place.transposed else whole.split([shape[0] for _, shape in place.parts])
        found |= {name: part for (name, _), part in zip(place.parts, parts, strict=True)}
    return found


def write_weights(tensors: dict[str, Tensor], dtype: torch.dtype, directory: Path, max_bytes: int) -> None:
    """Write one safetensors file, or an index and several of at most `max_bytes` (larger tensors get their own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    names = [WEIGHTS_FILE] if len(shards) == 1 else names
    for file, shard in zip(names, shards, strict=True):
        kept = {name: cast(tensors[name], dtype, name).contiguous() for name in shard}
        save_file(kept, directory / file, {"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_settings(
    architecture: Architecture, source: Source, model: dict[str, Any], tokenizer: Tokenizer, dtype: torch.dtype,
    directory: Path,
) -> None:  # fmt: skip
    """Write config.json and generation_config.json."""
    ends = [id for id in (tokenizer.end_of_text, *sorted(tokenizer.stop_ids)) if id is not None]
    ids = {"bos_token_id": begin_of_text(tokenizer)[0], "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    kind = str(dtype).removeprefix("torch.")
    config = write_config_json(architecture, model) | ids | {"pad_token_id": None, "dtype": kind}
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    given = source.directory / GENERATION_JSON
    generation = read_settings(given) if isinstance(source, HuggingFaceModel) and given.is_file() else ids
    (directory / GENERATION_JSON).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def model_card(
    source: Source, architecture: Architecture, model: dict[str, Any], size: int, tokenizer: Tokenizer, name: str
) -> str:
    """The text of README.md: the model's shape, and its training settings and validation loss if they are known."""
    shape = ", ".join(f"{key} {model[key]}" for key in ("n_layer", "n_head", "n_kv_head", "n_embd", "mlp_hidden"))
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- nib", "---", "", f"# {name}",
        "", f"A language model of {size / 1e6:.2f} M parameters, exported by nib as {architecture.name}: {shape}, "
        f"a context of {counted(model['block_size'], 'token')}, and a vocabulary of {model['vocab_size']} "
        f"({tokenizer.name}).",
        "", "```python", "from transformers import pipeline", "",
        f'write = pipeline("text-generation", {json.dumps(name)})', 'print(write("Once")[0]["generated_text"])',
        "```",
    ]  # fmt: skip
    if state := getattr(source, "state", {}):
        settings, progress = state.get("settings", {}), state.get("progress", {})
        lines += ["", "## Training", "", "| setting | value |", "|---|---|"]
        lines += [f"| {key} | {settings[key]} |" for key in CARD_KEYS if key in settings]
        lines += [f"| {key} | {progress[key]} |" for key in ("step", "tokens") if key in progress]
        if found := last_validation(source.directory, progress.get("step", 0)):
            loss, bits = found["val_loss"], found.get("val_bits_per_byte", float("nan"))
            lines += ["", f"Validation at step {found['step']}: {loss:.4f} nats a token, {bits:.4f} bits per byte."]
    else:
        lines += ["", f"Its weights come from {source.directory.name}."]
    return "\n".join(lines) + "\n"


def last_validation(checkpoint: Path, step: int) -> dict[str, Any]:
    """The last validation up to `step` in the metrics of the checkpoint's run; empty if there is none."""
    try:
        lines = (checkpoint.parent.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        known = [line for line in map(json.loads, lines) if line.get("val_loss") is not None and line["step"] <= step]
        return known[-1] if known else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
