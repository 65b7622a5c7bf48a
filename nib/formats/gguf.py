"""GGUF, the one-file format of llama.cpp, written with the optional package gguf.

llama.cpp's own converter recognises a tokenizer by a hash of its output, so it refuses one that nib trained.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nib.common.device import cast
from nib.common.exits import InputError
from nib.formats.architectures import Architecture, rope_scaling
from nib.tokenizer.huggingface import begin_of_text, special_ids_around
from nib.tokenizer.tokenizer import SPLIT_PATTERN, ByteTokenizer, Tokenizer

# llama.cpp has one activation for each architecture, and no sliding window in these.
ACTIVATION = {"gpt2": "gelu_tanh", "llama": "swiglu", "qwen3": "swiglu", "arcee": "relu2"}
INTERLEAVED = ("llama", "arcee")  # RoPE rotates adjacent channels, so the rows of queries and keys are permuted
PRE_TOKENIZERS = {  # split pattern without possessive quantifiers: llama.cpp's name
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+$|\s+(?!\S)|\s": "gpt-2",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    SPLIT_PATTERN: "llama-bpe",
    SPLIT_PATTERN.replace("{1,3}", ""): "qwen2",
}


def check_gguf(
    architecture: Architecture, model: dict[str, Any], tokenizer: Tokenizer, content: dict[str, Any]
) -> None:
    """Raise InputError for a model that llama.cpp does not support, or if the package gguf is missing."""
    if ACTIVATION.get(architecture.model_type) != model["mlp"] or model["window"]:
        asked = f"{architecture.name} with mlp={model['mlp']}" + (f", window={model['window']}" * bool(model["window"]))
        raise InputError(f"GGUF is written for {', '.join(ACTIVATION)}, not for {asked}. Use --format=hf")
    if model["bias"] and architecture.model_type == "arcee":
        raise InputError(f"llama.cpp has no biases in {architecture.name}. Use --format=hf")
    kind, scaling = model["rope_scaling"], rope_scaling(model)
    if kind == "llama3" and architecture.model_type not in INTERLEAVED:
        raise InputError(f"llama.cpp has no rope_scaling=llama3 for {architecture.name}. Use --format=hf")
    if kind == "yarn" and (scaling["beta_slow"], scaling["beta_fast"]) != (1, 32):  # these architectures read no others
        raise InputError("llama.cpp has rope_scaling=yarn with rope_slow=1 and rope_fast=32 only. Use --format=hf")
    if len(tokenizer.stop_ids) > 2:
        ids = ", ".join(map(str, sorted(tokenizer.stop_ids)))
        raise InputError(f"llama.cpp has 3 ids to end a text; this model has {ids} and end-of-text. Use --format=hf")
    pre_tokenizer(tokenizer, content)
    after = special_ids_around(tokenizer)[1]
    if after not in ([], [tokenizer.end_of_text]):
        raise InputError(f"llama.cpp puts nothing after a text as {tokenizer.name} does. Use --format=hf")
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise InputError("--format=gguf needs a package. Run: pip install gguf") from None


def write_gguf(
    path: Path, architecture: Architecture, model: dict[str, Any],
    tensors: dict[str, Tensor], dtype: torch.dtype, tokenizer: Tokenizer,
    content: dict[str, Any],
) -> None:  # fmt: skip
    """Write the tensors (named as in transformers), the settings and the tokenizer. Call `check_gguf` first."""
    import gguf

    kind, pre = architecture.model_type, pre_tokenizer(tokenizer, content)
    writer = gguf.GGUFWriter(path, kind)
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == torch.float32 else f"MOSTLY_{types[dtype]}"])
    add_shape(writer, model)
    add_tokens(writer, gguf.TokenType, content, model["vocab_size"])
    begin, is_added = begin_of_text(tokenizer)
    if begin is not None and tokenizer.end_of_text is not None:
        writer.add_bos_token_id(begin)
        writer.add_eos_token_id(tokenizer.end_of_text)
    more = sorted(tokenizer.stop_ids)
    for add, id in zip((writer.add_eot_token_id, writer.add_eom_token_id), more, strict=False):
        add(id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_add_bos_token(is_added)
    writer.add_add_eos_token(bool(special_ids_around(tokenizer)[1]))
    writer.add_tokenizer_pre(pre)

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == kind)
    names = gguf.get_tensor_name_map(arch, model["n_layer"])
    if model["rope_scaling"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(model).numpy())
    for theirs, tensor in tensors.items():
        if architecture.transposed and tensor.ndim == 2 and ".h." in theirs:
            tensor = tensor.T
        if kind in INTERLEAVED and (part := re.search(r"\.([qk])_proj\.", theirs)):
            heads = model["n_head"] if part[1] == "q" else model["n_kv_head"]
            halves = tensor.reshape(heads, 2, model["head_size"] // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        ours = str(names.get_name(theirs, try_suffixes=(".weight", ".bias")))
        data = cast(tensor, dtype, theirs).float().contiguous().numpy()
        stored = gguf.GGMLQuantizationType[types[dtype] if tensor.ndim > 1 else "F32"]
        writer.add_tensor(ours, gguf.quants.quantize(data, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: Any, model: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_vocab_size(model["vocab_size"])
    writer.add_context_length(model["block_size"])
    writer.add_embedding_length(model["n_embd"])
    writer.add_block_count(model["n_layer"])
    writer.add_feed_forward_length(model["mlp_hidden"])
    writer.add_head_count(model["n_head"])
    writer.add_head_count_kv(model["n_kv_head"])
    if model["norm"] == "rmsnorm":
        writer.add_layer_norm_rms_eps(model["norm_eps"])
    else:
        writer.add_layer_norm_eps(model["norm_eps"])
    if model["position"] == "rope":
        writer.add_rope_freq_base(model["rope_base"])
        writer.add_rope_dimension_count(model["head_size"])
        writer.add_key_length(model["head_size"])
        writer.add_value_length(model["head_size"])
    scaling = rope_scaling(model)
    if model["rope_scaling"] in ("linear", "yarn"):  # llama.cpp lacks dynamic, which acts only beyond the context
        writer.add_rope_scaling_type(RopeScalingType(model["rope_scaling"]))
        writer.add_rope_scaling_factor(scaling["factor"])
    if model["rope_scaling"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        usual = 0.1 * math.log(scaling["factor"]) + 1.0  # llama.cpp multiplies by this itself
        writer.add_rope_scaling_attn_factors(scaling["attention_factor"] / usual)


def llama3_divisors(model: dict[str, Any]) -> Tensor:
    """The divisors that llama.cpp applies to the frequency of each pair of channels (D / 2,)."""
    scaling, D = rope_scaling(model), model["head_size"]
    turns = scaling["original_max_position_embeddings"] / math.tau / model["rope_base"] ** (torch.arange(0, D, 2) / D)
    slow, fast = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - slow) / (fast - slow)).clamp(0, 1)
    return 1.0 / ((1 - kept) / scaling["factor"] + kept)


def add_tokens(writer: Any, types: Any, content: dict[str, Any], vocab_size: int) -> None:
    """Add the merges, and the tokens by id: ids without a token are UNUSED, those beyond the model's are left out."""
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    kinds = [types.UNUSED] * vocab_size
    known = [(token, id, types.NORMAL) for token, id in content["model"]["vocab"].items()]
    for added in content["added_tokens"]:
        known.append((added["content"], added["id"], types.CONTROL if added["special"] else types.USER_DEFINED))
    for token, id, kind in known:
        if id < vocab_size:
            tokens[id], kinds[id] = token, kind
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # The array cannot be empty. The pair "Ā Ā" makes no token of the vocabulary, so it changes nothing.
    writer.add_token_merges(merges or ["Ā Ā"])


def pre_tokenizer(tokenizer: Tokenizer, content: dict[str, Any]) -> str:
    """llama.cpp's name for the pre-tokenizer of a tokenizer.json. Raises InputError if it has none."""
    split = content.get("pre_tokenizer") or {}
    parts = split.get("pretokenizers", [split])
    kinds = [part.get("type") for part in parts]
    by_regex = parts[-1].get("use_regex") is True
    if any(part.get("add_prefix_space") for part in parts):
        raise InputError(f"llama.cpp puts no space before a text as {tokenizer.name} does. Use --format=hf")
    if isinstance(tokenizer, ByteTokenizer) or (kinds == ["ByteLevel"] and by_regex):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_regex and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_regex:
        pattern = str(parts[0].get("pattern", {}).get("Regex", ""))
        plain = re.sub(r"([+*?]|\{\d+,?\d*\})\+", r"\1", pattern).replace(r"\z", "$")
        if plain in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[plain]
    raise InputError(f"llama.cpp has no tokenizer like {tokenizer.name}. Use bpe:N, gpt2 or byte, or --format=hf")
