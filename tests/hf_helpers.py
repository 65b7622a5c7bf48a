"""Tiny models of transformers with large random weights, saved as it saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model_helpers import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import GPT, GPTConfig
from nib.formats.export import export
from nib.formats.huggingface import HuggingFaceModel
from nib.formats.load import build, open_source, read_config, read_weights

SMALL = dict(
    vocab_size=40, max_position_embeddings=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, intermediate_size=48, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
GPT2 = dict(vocab_size=40, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)


def rope(base: float) -> dict[str, Any]:
    """Both ways to say it: of transformers 4 and 5."""
    return {"rope_theta": base, "rope_scaling": None, "rope_parameters": {"rope_type": "default", "rope_theta": base}}


# Name of a case: the class without its ending, and its settings.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", {}),
    "GPT-2, untied, exact gelu": ("GPT2", dict(tie_word_embeddings=False, activation_function="gelu", n_inner=80)),
    "Llama": ("Llama", dict(rms_norm_eps=1e-3)),
    "Llama, grouped heads, tied": ("Llama", dict(num_key_value_heads=2, tie_word_embeddings=True, **rope(500.0))),
    "Llama, one key/value head, wide heads": ("Llama", dict(num_key_value_heads=1, head_dim=16)),
    "Llama, biases": ("Llama", dict(attention_bias=True, mlp_bias=True)),
    "Llama, biases in attention": ("Llama", dict(attention_bias=True)),
    "Mistral, window": ("Mistral", dict(sliding_window=6, num_key_value_heads=2, head_dim=8)),
    "Qwen2": ("Qwen2", dict(num_key_value_heads=2)),
    "Qwen3": ("Qwen3", dict(head_dim=16, num_key_value_heads=2, **rope(1e6))),
    "Qwen3, tied": ("Qwen3", dict(head_dim=8, tie_word_embeddings=True)),
    "Qwen3, window": ("Qwen3", dict(head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "Arcee": ("Arcee", dict(num_key_value_heads=2)),
    "Arcee, tied": ("Arcee", dict(tie_word_embeddings=True)),
    "Starcoder2": ("Starcoder2", dict(num_key_value_heads=2)),
    "Starcoder2, no biases, window": ("Starcoder2", dict(use_bias=False, sliding_window=7, tie_word_embeddings=False)),
}


def make_model(kind: str, **settings: Any) -> Any:
    """A model of transformers in which no two parts could be swapped unnoticed."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**((GPT2 if kind == "GPT2" else SMALL) | settings))
    config._attn_implementation = "eager"
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    randomise(model)
    return model


def save_model(directory: Path, kind: str = "Llama", **settings: Any) -> Path:
    make_model(kind, **settings).save_pretrained(directory)
    return directory


def load_ours(directory: Path) -> GPT:
    source = HuggingFaceModel(directory)
    config = read_config(source, GPTConfig)
    return build(source, lambda: GPT(config)).eval()


def weights_of(target: Path) -> dict[str, Tensor]:
    source = open_source(str(target))
    return read_weights(source, lambda: GPT(read_config(source, GPTConfig)))


def exported(target: Path, out: Path, **options: Any) -> str:
    """What export.py does."""
    source = open_source(str(target))
    return export(source, read_config(source, GPTConfig), weights_of(target), out, **options)


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "remove"}))


def change_tensors(directory: Path, change: Any, name: str = "model.safetensors") -> None:
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name, {"format": "pt"})


@torch.no_grad()
def their_logits(model: Any, tokens: Tensor) -> Tensor:
    return model(tokens).logits


@torch.no_grad()
def greedy(logits_of: Any, tokens: Tensor, count: int) -> list[int]:
    """The most probable continuation, everything computed anew at each token."""
    for _ in range(count):
        tokens = torch.cat((tokens, logits_of(tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens[0, -count:].tolist()
